"""What is said of precisions that a GPU runs more slowly than bf16."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from starquant.packed.speed import MEASURED, note_speed
from tests.support.paths import REPOSITORY
from tests.support.specs import spec

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_what_it_says_was_measured() -> None:
    path = REPOSITORY / "results" / "published" / "efficiency" / "h100_afb57db.json"
    rows = json.loads(path.read_text())["rows"]
    ms = {
        row["precision"]: row["ms"]
        for row in rows
        if (row["model"], row["tokens"]) == ("llada", 1024) and row["launch"] == "graph"
    }
    assert {(8, 8): round(ms["bf16"] / ms["w8a8"], 2), (4, 16): round(ms["bf16"] / ms["w4a16"], 2)} == MEASURED


@pytest.mark.parametrize(
    ("bits", "device", "said"),
    [
        ("w8a8", GPU, "W8A8 on a GPU: from 128 tokens a pass on bf16 was faster"),
        ("w4a16", GPU, "W4A16 on a GPU: from 128 tokens a pass on bf16 was faster"),
        ("w4a4", GPU, None),
        ("w8a8", CPU, None),
    ],
)
def test_it_is_said_on_a_gpu_and_once(
    bits: str, device: torch.device, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "starquant"):
        note_speed(spec(f"bits={bits}").bits.model_dump(mode="json"), device)
    assert [record.getMessage()[: len(said or "")] for record in caplog.records] == ([] if said is None else [said])
