"""Which scored tasks and items calibration has already seen."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import get_args

import pytest
from transformers import PreTrainedTokenizerBase

from starquant.calibration.overlap import TASKS as tasks_of_kind
from starquant.calibration.overlap import dataset_overlap, item_overlap
from starquant.calibration.segments import read_segments
from starquant.config.calibration import SourceSpec

TASKS = ["winogrande", "gsm8k", "gsm8k_cot", "testbed_facts", "testbed_programs", "mmlu", "gsm8kx"]
TASKS += ["smol_sums", "smol_lists_validation"]


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("winogrande", ["winogrande"]),
        ("gsm8k", ["gsm8k", "gsm8k_cot"]),
        ("testbed", ["testbed_facts", "testbed_programs"]),
        ("text", []),
        ("smol", ["smol_sums", "smol_lists_validation"]),
        ("smol_tasks", ["smol_sums", "smol_lists_validation"]),
        ("smol_text", []),
    ],
)
def test_tasks_of_the_same_data_set(kind: str, found: list[str]) -> None:
    assert dataset_overlap(SourceSpec(kind=kind, path="x.txt", segments=1, length=1), TASKS) == found


def test_tasks_of_every_kind_of_source_are_known() -> None:
    """A kind that is no prefix of its tasks' names would be taken as seen by none of them."""
    assert {*tasks_of_kind} == {*get_args(SourceSpec.model_fields["kind"].annotation)}


def words(begin: int, end: int) -> str:
    return " ".join(f"w{i}" for i in range(begin, end))


@pytest.mark.parametrize(
    ("document", "shared"),
    [
        (words(20, 32), True),  # 12 words
        (words(20, 31) + " x y", False),  # 11 of them, then others
        (f"x y {words(5, 17)} z", True),  # inside of a longer document
        (words(3, 8), True),  # a short document, whole
        (words(3, 7), False),  # too short to say
        (words(3, 10) + " x", False),  # a short document, not whole
        ("W3  W4\n\tw5 W6 w7", True),  # case and white space
        (words(35, 41), False),  # across two texts
        ("", False),
    ],
)
def test_documents_that_were_seen(document: str, shared: bool) -> None:
    assert item_overlap([words(0, 38), words(38, 60)], [document, "something else entirely, at some length"]) == shared


def test_same_as_searching_the_texts() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices("ab", k=60)) for _ in range(8)]
    documents = [" ".join(rng.choices("ab", k=rng.randint(1, 25))) for _ in range(200)]

    def seen(document: str) -> bool:
        own = document.split()
        n = min(12, len(own))
        runs = (" ".join(own[i : i + n]) for i in range(len(own) - n + 1))
        return len(own) >= 5 and any(run in text for run in runs for text in texts)

    expected = sum(map(seen, documents))
    assert 0 < expected < len(documents)
    assert item_overlap(texts, documents) == expected


def test_real_items(benchmark_data: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    def segments(split: str) -> list[str]:
        spec = SourceSpec(kind="gsm8k", split=split, segments=64, length=256)
        read = read_segments(spec, tiny_tokenizer, 256, seed=0, data_dir=str(benchmark_data))
        return [segment.text for segment in read]

    lines = (benchmark_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    assert item_overlap(segments("test"), questions) >= 64
    assert item_overlap(segments("train"), questions) < 8
