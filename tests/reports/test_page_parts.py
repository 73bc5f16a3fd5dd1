"""Parts of a page: flipped answers, curves of fidelity, what each operand loses, where records come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from starquant.errors import RecordError
from starquant.reports.page.activations import MOST_BLOCKS, densities
from starquant.reports.page.fidelity import along_steps, by_mask_ratio
from starquant.reports.page.flips import MOST_ITEMS, answer_of, flips
from starquant.reports.page.provenance import HEADER, provenance, sqnr
from starquant.reports.page.rows import PageRow, rows_of
from starquant.reports.selection import read_runs
from tests.support.pages import FACTS, fill, put, score_of_bin
from tests.support.records import edit_record


def rows(folder: Path) -> list[PageRow]:
    return rows_of(read_runs(folder), None, [])


def test_flipped_answers_item_by_item(tmp_path: Path) -> None:
    fill(tmp_path)
    gptq, rtn = flips(rows(tmp_path))
    assert (gptq["row"], gptq["task"], gptq["n"], gptq["lost"], gptq["won"], gptq["other"]) == (1, FACTS, 4, 1, 0, 0)
    assert [(item["item"], item["kind"]) for item in rtn["items"]] == [(0, "lost"), (1, "lost"), (3, "other")]
    assert rtn["items"][0] == {
        "item": 0,
        "filter": "none",
        "question": "",
        "target": "t0",
        "full": "a",
        "quantized": "b",
        "scores": [1.0, 0.0],
        "kind": "lost",
    }
    assert rtn["reference"].startswith("tiny-w16a16-none-") and rtn["record"].startswith("tiny-w4a4-rtn-")


def test_flips_that_are_not_shown_are_counted(tmp_path: Path) -> None:
    many = MOST_ITEMS + 10
    put(tmp_path, [1.0] * many, "method=none", "bits=w16a16", answers=["x"] * many)
    put(tmp_path, [0.0] * many, "method=rtn", "bits=w4a4", answers=["x" * 5000] * many)
    (part,) = flips(rows(tmp_path))
    assert (part["lost"], len(part["items"]), len(part["items"][0]["quantized"])) == (many, MOST_ITEMS, 603)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ({"resps": [["17"]], "filtered_resps": ["17"]}, ("17", "17")),
        ({"filtered_resps": [[-2.0, False], [-0.5, True]]}, ("choice 1", "choice 1 (-0.500 nats)")),
        ({}, ("", "")),  # of published records
        ({"resps": [[]]}, ("[]", "[]")),
    ],
)
def test_an_answer(line: dict, answer: tuple[str, str]) -> None:
    assert answer_of(line) == answer


def fidelity(*prompts: list[tuple[float, float]]) -> list[dict]:
    """Rows of (kl, commit_flips) a prompt and step."""
    return [
        {"prompt": p, "doc_hash": f"p{p}", "step": s, "mask_ratio": 1 - s / 2, "kl": kl, "commit_flips": flip}
        for p, steps in enumerate(prompts)
        for s, (kl, flip) in enumerate(steps)
    ]


def test_curves_by_step_and_by_mask_ratio(tmp_path: Path) -> None:
    lines = fidelity([(1.0, 0.0), (3.0, 0.5)], [(2.0, 0.0), (5.0, 0.0)])
    scores = [
        score_of_bin("top1_agreement", "mask_ratio_0.50_0.75", 0.25),
        score_of_bin("top1_agreement", "mask_ratio_0.75_1.00", 0.5),
    ]
    put(tmp_path, [1.0, 0.0], "method=rtn", "bits=w4a4", "fidelity=testbed", items={"fidelity": lines}, scores=scores)
    steps, parted = along_steps(rows(tmp_path))
    assert [(point["x"], point["mean"]) for point in steps if point["metric"] == "kl"] == [(1, 1.5), (2, 4.0)]
    assert all(point["low"] <= point["mean"] <= point["high"] for point in steps)
    assert [(point["x"], point["mean"]) for point in parted] == [(1, 0.0), (2, 50.0)]
    ratios = by_mask_ratio(rows(tmp_path))
    assert [(point["x"], point["mean"], point["low"], point["high"]) for point in ratios] == [
        (0.625, 25.0, 12.5, 50.0),
        (0.875, 50.0, 25.0, 100.0),
    ]


def test_an_answer_that_has_parted_stays_parted(tmp_path: Path) -> None:
    lines = fidelity([(1.0, 1.0), (1.0, 0.0)], [(1.0, 0.0), (1.0, 0.0)])
    put(tmp_path, [1.0, 0.0], "method=rtn", "bits=w4a4", "fidelity=testbed", items={"fidelity": lines})
    assert [point["mean"] for point in along_steps(rows(tmp_path))[1]] == [50.0, 50.0]


def test_what_operands_lose_and_where_a_record_is_from(tmp_path: Path) -> None:
    path = put(tmp_path, [1.0, 0.0], "method=rtn", "bits=w4a4", "tasks.limit=2")

    def change(data: dict) -> None:
        entry = {"name": "b.0.q", "kind": "linear", "role": "q_proj", "block": 0, "site": "b.0.qkv_input"}
        entry |= {"weight_sqnr_db": 16.428, "activation_sqnr_db": 18.84}
        data["manifest"] = [entry, {"name": "head", "kind": "head", "role": "head", "weight_sqnr_db": 1.0}]
        data["provenance"] |= {"git_sha": "0123456789abcdef", "git_dirty": True, "code_digest": "cafe"}

    edit_record(path, change)
    assert sqnr(rows(tmp_path)) == [
        {"row": "w4a4 rtn", "what": "weights: q_proj", "block": 0, "db": 16.43},
        {"row": "w4a4 rtn", "what": "activations: qkv_input", "block": 0, "db": 18.84},
    ]
    (line,) = provenance(rows(tmp_path))
    told = dict(zip(HEADER, line, strict=True))
    assert told["code"] == "0123456789ab and changes; cafe"
    assert (told["items"], told["record"], told["seal"]) == ("first 2 of each", path.stem, "sealed")


def test_histograms_of_activations(tmp_path: Path) -> None:
    state = {"density": [0.0, 0.123456, 0.5, 0.0]}
    rows = [{"block": b, "site": "qkv_input", "masked": state, "unmasked": state} for b in range(40)]
    report = {"kind": "activations", "schema_version": 1, "half_range": 8.0, "name": "a", "rows": rows}
    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / "a.json").write_text(json.dumps(report))
    points = densities(tmp_path)
    assert len(points) == MOST_BLOCKS * 2 * 2  # states, bins that are not empty
    assert {point["block"] for point in points} >= {"block 0", "block 39"}
    assert [(point["x"], point["density"]) for point in points[:2]] == [(-2.0, 0.123), (2.0, 0.5)]
    (tmp_path / "activations" / "b.json").write_text("{}")
    with pytest.raises(RecordError, match="not a report of activations"):
        densities(tmp_path)
