"""Runs of a table: found, chosen by keys, refused where they do not go together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from starquant.errors import RecordError
from starquant.reports.run import Run
from starquant.reports.selection import ALLOWED, one_a_seed, read_runs, validate_together
from tests.support.tables import FACTS, put, score

VALUES = {FACTS: [1.0, 0.0, 1.0]}


def only(folder: Path) -> Run:
    (run,) = read_runs(folder)
    return run


def test_records_of_a_results_folder_are_read_and_nothing_beside_them(tmp_path: Path) -> None:
    path = put(tmp_path, VALUES)
    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / "report.json").write_text("{}")
    assert [run.path for run in read_runs(tmp_path)] == [path]
    assert [run.path for run in read_runs(tmp_path / "records")] == [path]


def test_a_missing_folder_and_a_damaged_record_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="nowhere: no such folder of records"):
        read_runs(tmp_path / "nowhere")
    path = put(tmp_path, VALUES)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(RecordError, match=f"{path}: not readable as a record"):
        read_runs(tmp_path)


def test_runs_are_chosen_by_dotted_keys(tmp_path: Path) -> None:
    put(tmp_path, VALUES, "star_quant", changes={"method.tac.block_size": 32})
    run = only(tmp_path)
    assert run.get("method.tac.block_size") == 32
    assert run.get("method.tac.block_size.deeper") is run.get("method.no.such") is None
    assert run.matches({"method.tac.block_size": 32, "bits.name": "w4a4", "method.no.such": None})
    assert not run.matches({"method.tac.block_size": 32, "bits.name": "w8a8"})
    assert run.matches({})


def test_a_score_is_found_by_metric_and_filter_or_is_the_first(tmp_path: Path) -> None:
    put(tmp_path, VALUES)
    run = only(tmp_path)
    scores = [score("a", 1, "m"), score("b", 2, "m", "x"), score("b", 3, "m", "y"), score("b", 4, "n", "y")]
    run = Run(run.path, run.record.model_copy(update={"scores": scores}))

    def value(*asked: Any) -> float | None:
        found = run.score(*asked)
        return None if found is None else found.value

    assert value("b", None, None) == 2
    assert value("b", "m", "y") == 3
    assert value("b", "n", None) == 4
    assert value("b", "n", "x") is value("c", None, None) is None


def test_leaves_of_a_group_are_in_one_order_wherever_they_are_read_from(tmp_path: Path) -> None:
    path = put(tmp_path, {"mmlu_z": [1.0, 0], "mmlu_a": [0.0, 1], "mmluother": [1.0]}, model="llada", groups=["mmlu"])
    assert only(tmp_path).leaves("mmlu") == ["mmlu_a", "mmlu_z"]
    assert only(tmp_path).leaves("mmlu_z") == ["mmlu_z"]
    (path.with_suffix(".items") / "columns.json").unlink()
    assert only(tmp_path).leaves("mmlu") == ["mmlu_a", "mmlu_z"]


MIXTURES = {
    "dirty": ({"dirty": True}, "1 of 2 records are of code that was not committed, the first tiny-w4a4-quarot-"),
    "versions": (
        {"told": {"task_version": "2.0"}},
        r"testbed_facts \(version, few-shot\): \('2.0', 0\) in tiny-w4a4-q",
    ),
    "protocols": ({"changes": {f"model.protocol.{FACTS}.mc_num": 4}}, f"model.protocol.{FACTS}: .*'mc_num': 4"),
    "items": ({"documents": {FACTS: "b"}}, f"items and examples of {FACTS}: b in tiny-w4a4-q.*, a in tiny-w4a4-rtn"),
}


@pytest.mark.parametrize("kind", ALLOWED)
def test_mixtures_are_refused_unless_they_are_allowed(tmp_path: Path, kind: str) -> None:
    how, message = MIXTURES[kind]
    put(tmp_path, VALUES, documents={FACTS: "a"})
    put(tmp_path, VALUES, "quarot", **({"documents": {FACTS: "a"}} | how))
    runs = read_runs(tmp_path)
    with pytest.raises(RecordError, match=f"{message}.*--allow {kind}"):
        validate_together(runs)
    with pytest.raises(RecordError, match=f"--allow {kind}"):
        validate_together(runs, [name for name in ALLOWED if name != kind])
    validate_together(runs, [kind])


def test_runs_on_other_items_are_not_of_one_table(tmp_path: Path) -> None:
    """Also where the records tell nothing but what their items are."""
    put(tmp_path, VALUES)
    put(tmp_path, {FACTS: [1.0, 0.0, 1.0, 1.0]}, "quarot")
    with pytest.raises(RecordError, match=rf"items of {FACTS}: \w{{16}} in tiny-.*, \w{{16}} in .*--allow items"):
        validate_together(read_runs(tmp_path))


def test_limits_that_differ_are_always_refused(tmp_path: Path) -> None:
    put(tmp_path, VALUES)
    put(tmp_path, VALUES, "quarot", changes={"tasks.limit": 3})
    with pytest.raises(RecordError, match=r"tasks\.limit: 3 in tiny-w4a4-quarot-.*, None in tiny-w4a4-rtn-[^;]*$"):
        validate_together(read_runs(tmp_path), [*ALLOWED])


def test_approximate_records_are_never_mixed_with_exact_ones(tmp_path: Path) -> None:
    put(tmp_path, VALUES)
    put(tmp_path, VALUES, "quarot", changes={"speed": {"kv_cache": "dual"}})
    with pytest.raises(RecordError, match=r"speed \(approximations\): dual KV cache in tiny-.*, exact in tiny-"):
        validate_together(read_runs(tmp_path), [*ALLOWED])


@pytest.mark.parametrize(
    "how",
    [
        {"told": {"num_fewshot": 5}},
        {"changes": {f"model.protocol.{FACTS}.cfg_scale": 0.5}},
        {"dirty": None},  # nobody knows
    ],
)
def test_other_mixtures(tmp_path: Path, how: dict[str, Any]) -> None:
    put(tmp_path, VALUES)
    put(tmp_path, VALUES, "quarot", **how)
    with pytest.raises(RecordError, match="--allow"):
        validate_together(read_runs(tmp_path))


def test_models_have_versions_and_protocols_of_their_own(tmp_path: Path) -> None:
    put(tmp_path, VALUES)
    put(tmp_path, VALUES, told={"num_fewshot": 5}, changes={"tasks.limit": 3, "model.name": "other"})
    validate_together(read_runs(tmp_path))


def test_a_protocol_of_a_task_that_is_not_scored_does_not_matter(tmp_path: Path) -> None:
    put(tmp_path, VALUES)
    put(tmp_path, VALUES, "quarot", changes={"model.protocol.piqa.mc_num": 4})
    validate_together(read_runs(tmp_path))


def test_two_records_of_the_same_seeds_are_refused_by_the_key_that_differs(tmp_path: Path) -> None:
    for block_size in (8, 16):
        put(tmp_path, VALUES, "star_quant", changes={"method.tac.block_size": block_size})
    with pytest.raises(RecordError) as caught:
        one_a_seed("STaR-Quant", read_runs(tmp_path))
    said = str(caught.value)
    assert said.startswith("STaR-Quant: tiny-w4a4-star_quant-")
    assert "are both its records; they differ in method.tac.block_size (" in said
    assert "(8 and 16)" in said or "(16 and 8)" in said
    ways = {f"--where method.tac.block_size={size}" for size in (8, 16)}
    assert {*re.findall(r"--where \S+\w", said)} == ways


def test_copies_of_a_record_are_one_where_their_scores_are(tmp_path: Path) -> None:
    put(tmp_path, VALUES)
    record = only(tmp_path).record
    runs = [Run(Path(name), record) for name in ("a.json", "b.json")]
    assert [run.path.name for run in one_a_seed("RTN", runs).values()] == ["a.json"]
    other = record.model_copy(update={"scores": [score(FACTS, 0.25)]})
    message = (
        r"a\.json and b\.json are both its records; they are of one experiment and differ in testbed_facts acc "
        r"\(0\.666667 and 0\.25\); give a folder with one of them$"
    )
    with pytest.raises(RecordError, match=message):
        one_a_seed("RTN", [runs[0], Run(Path("b.json"), other)])


def test_runs_of_other_seeds_go_together_in_the_order_of_seeds(tmp_path: Path) -> None:
    seeds = [(m, r) for m in (0, 1) for r in (0, 2, 10)]
    for model, rotation in seeds:
        put(tmp_path, VALUES, "quarot", seed=model, rotation=rotation)
    put(tmp_path, VALUES, "quarot", seed=1, rotation=0, changes={"seed": 7})
    runs = read_runs(tmp_path)
    expected = sorted([(m, r, 0) for m, r in seeds] + [(1, 0, 7)])
    for order in (runs, runs[::-1]):
        found = one_a_seed("QuaRot", order)
        assert list(found) == expected
        assert all(
            (run.get("model.seed"), run.get("method.rotation_seed")) == seeds[:2] for seeds, run in found.items()
        )


LEFT_OUT = {"changes": {"tasks.left_out": {"humaneval": "why"}}}


def test_a_run_that_left_a_task_out_gives_way_to_one_that_scored_it_too(tmp_path: Path) -> None:
    put(tmp_path, VALUES, **LEFT_OUT)
    whole = put(tmp_path, {**VALUES, "humaneval": [1.0]}, changes={"tasks.data_fingerprint": "f"})
    runs = read_runs(tmp_path)
    for order in (runs, runs[::-1]):
        ((_, chosen),) = one_a_seed("RTN", order).items()
        assert (chosen.path, chosen.left_out) == (whole, {})


@pytest.mark.parametrize(
    "more",
    [
        {"values": {FACTS: [1.0, 1.0, 1.0], "piqa": [1.0]}},  # not what was left out, nor the same scores
        {"values": {FACTS: [1.0, 1.0, 1.0], "humaneval": [1.0], "piqa": [1.0]}},
        {"values": {**VALUES, "humaneval": [1.0]}, "changes": {"fidelity.bins": 3}},
    ],
)
def test_it_gives_way_to_no_other(tmp_path: Path, more: dict[str, Any]) -> None:
    put(tmp_path, VALUES, **LEFT_OUT)
    put(tmp_path, **more)
    with pytest.raises(RecordError, match="are both its records; they differ in"):
        one_a_seed("RTN", read_runs(tmp_path))


def test_a_task_that_was_left_out_can_be_scored_alone_and_joins(tmp_path: Path) -> None:
    put(tmp_path, VALUES, changes={**LEFT_OUT["changes"], "tasks.data_fingerprint": "e"})
    put(tmp_path, {"humaneval": [1.0]}, changes={"tasks.name": "alone", "tasks.data_fingerprint": "f"})
    ((_, joined),) = one_a_seed("RTN", read_runs(tmp_path)).items()
    assert sorted(joined.get("tasks.names")) == ["humaneval", FACTS]
    assert joined.left_out == {}
    assert {score.task for score in joined.record.scores} == {FACTS, "humaneval"}
