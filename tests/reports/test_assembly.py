"""Cells of a table agree with slow computations of their own; only what belongs together is paired."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

from starquant.errors import RecordError
from starquant.reports.assembly import AVERAGE, WHOLE, Estimate, Section, assemble, to
from starquant.reports.definitions import TABLES
from starquant.reports.selection import read_runs
from tests.support.records import edit_record
from tests.support.tables import FACTS, PROFILES, answers, put, score

Data = dict[tuple[int, int], dict[str, list[float]]]
STAR = to("STaR-Quant")
WHOLE_COLUMN = to(WHOLE)


def section(folder: Path, model: str = "tiny", name: str = "table1_main", allow: Sequence[str] = ()) -> Section:
    return next(s for s in assemble(TABLES[name], read_runs(folder), allow) if s.model == model)


def cells(folder: Path, label: str, **more: Any) -> dict[str, Estimate]:
    return next(found for name, _, found in section(folder, **more).rows if name == label)


def slow_stderr(data: Data, tasks: Sequence[str], resamples: int = 1500) -> float:
    """Draw rotations once a resample, items once a task; all models share the draws and count alike."""
    rng, means = random.Random(3), []
    models, rotations = sorted({m for m, _ in data}), sorted({r for _, r in data})
    n = len(next(iter(data.values()))[tasks[0]])
    for _ in range(resamples):
        drawn = [rng.choice(rotations) for _ in rotations]
        per_task = []
        for task in tasks:
            items = [rng.randrange(n) for _ in range(n)]
            per_task.append(fmean(fmean(data[m, r][task][i] for r in drawn for i in items) for m in models))
        means.append(fmean(per_task))
    return stdev(means)


def of_runs(offset: float = 0.0, spread: float = 0.0, seed: int = 0, n: int = 16) -> Data:
    """Two models, three rotations; `spread` moves all items of a rotation.

    What is drawn alike for both tasks shows: the second has the numbers of the first, and some more.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for model, rotation in itertools.product((0, 1), range(3)):
        values = offset + spread * (rotation - 1) + rng.normal(0, 0.1, n)
        found[model, rotation] = {FACTS: values.tolist(), PROFILES: (values + 0.1).tolist()}
    return found


def put_all(folder: Path, method: str, data: Data) -> None:
    for (model, rotation), values in data.items():
        put(folder, values, method, seed=model, rotation=rotation)


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_means_and_standard_errors_agree_with_a_slow_bootstrap(tmp_path: Path, spread: float) -> None:
    """Without spread items decide, with it rotations: a wrong draw of either is off by the square root of two."""
    data = of_runs(0.5, spread)
    put_all(tmp_path, "quarot", data)
    found = cells(tmp_path, "QuaRot")
    for task in (FACTS, PROFILES):
        assert found[task].value == pytest.approx(100 * fmean(fmean(v[task]) for v in data.values()))
        assert found[task].stderr == pytest.approx(100 * slow_stderr(data, [task]), rel=0.1)
    assert found[AVERAGE].value == pytest.approx(fmean([found[FACTS].value, found[PROFILES].value]))
    assert found[AVERAGE].stderr == pytest.approx(100 * slow_stderr(data, [FACTS, PROFILES]), rel=0.1)
    assert set(found) == {FACTS, PROFILES, AVERAGE}


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_differences_agree_with_a_slow_bootstrap_and_are_mirrored(tmp_path: Path, spread: float) -> None:
    ours, theirs = of_runs(0.6, spread, 1), of_runs(0.5, -spread, 2)
    put_all(tmp_path / "a", "quarot", ours)
    put_all(tmp_path / "a", "star_quant", theirs)
    put_all(tmp_path / "b", "star_quant", ours)
    put_all(tmp_path / "b", "quarot", theirs)
    found, mirrored = (cells(tmp_path / folder, "QuaRot")[STAR] for folder in "ab")
    difference = {
        run: {t: [a - b for a, b in zip(ours[run][t], theirs[run][t], strict=True)] for t in ours[run]} for run in ours
    }
    assert found.value == pytest.approx(100 * fmean(fmean(v) for run in difference.values() for v in run.values()))
    assert found.stderr == pytest.approx(100 * slow_stderr(difference, [FACTS, PROFILES]), rel=0.1)
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(4 * found.stderr, rel=0.2)
    expected = (-found.value, -found.high, -found.low)
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx(expected)


def test_one_run_shows_the_standard_error_of_its_score(tmp_path: Path) -> None:
    stderr = float(np.std(answers(0), ddof=1)) / len(answers(0)) ** 0.5
    put(tmp_path / "a", {FACTS: answers(0)}, told={"stderr": stderr})
    assert cells(tmp_path / "a", "RTN")[FACTS].stderr == pytest.approx(100 * stderr)
    put(tmp_path / "b", {FACTS: (values := answers(0, 50))})
    expected = 100 * float(np.std(values)) / 50**0.5
    assert cells(tmp_path / "b", "RTN")[FACTS].stderr == pytest.approx(expected, rel=0.1)


def test_pairs_are_of_equal_seeds_and_items(tmp_path: Path) -> None:
    """Every pair differs by the same at each item, so that any other pairing has an interval of some width."""
    base = of_runs()
    put_all(tmp_path, "quarot", {run: {FACTS: [x + 0.25 for x in values[FACTS]]} for run, values in base.items()})
    put_all(tmp_path, "star_quant", {run: {FACTS: values[FACTS]} for run, values in base.items()})
    found = cells(tmp_path, "QuaRot")[STAR]
    assert (found.value, found.low, found.high) == pytest.approx((25, 25, 25))
    assert found.stderr == pytest.approx(0, abs=1e-6)
    assert STAR not in cells(tmp_path, "STaR-Quant")


def test_runs_without_a_partner_are_left_out_of_the_difference(tmp_path: Path) -> None:
    for rotation, value in ((0, 0.9), (1, 0.5)):
        put(tmp_path, {FACTS: [value] * 3}, "quarot", rotation=rotation)
    for rotation, value in ((1, 0.4), (2, 0.0)):
        put(tmp_path, {FACTS: [value] * 3}, "star_quant", rotation=rotation)
    put(tmp_path, {FACTS: [0.0] * 3}, "awq", seed=1)
    assert cells(tmp_path, "QuaRot")[STAR].value == pytest.approx(10)
    assert STAR not in cells(tmp_path, "AWQ")  # another model seed


def test_a_method_without_rotation_is_paired_with_every_rotation(tmp_path: Path) -> None:
    plain = {0: [0.5, 0.3, 0.1], 1: [0.2, 0.2, 0.9]}
    for seed, values in plain.items():
        put(tmp_path, {FACTS: values}, "none", "w16a16", seed=seed)
        put(tmp_path, {FACTS: values}, "rtn", seed=seed)
        for rotation, shift in ((0, 0.1), (1, 0.3)):
            put(tmp_path, {FACTS: [x + shift for x in values]}, "star_quant", seed=seed, rotation=rotation)
    rtn, star = cells(tmp_path, "RTN"), cells(tmp_path, "STaR-Quant")
    assert rtn[STAR].value == pytest.approx(-20)
    assert (rtn[STAR].low, rtn[STAR].high) == pytest.approx((-30, -10))  # both rotations, and nothing of items
    assert star[to(WHOLE)].value == pytest.approx(20)
    assert rtn[to(WHOLE)] == Estimate(0, 0, 0, 0)
    assert to(WHOLE) not in cells(tmp_path, "full precision")
    assert cells(tmp_path, "full precision")[STAR].value == pytest.approx(-20)


def test_models_count_alike_whatever_their_number_of_runs(tmp_path: Path) -> None:
    for rotation in range(3):
        put(tmp_path, {FACTS: [1.0, 1.0]}, "quarot", seed=0, rotation=rotation, kl=[0.1, 0.1])
    put(tmp_path, {FACTS: [0.0, 0.0]}, "quarot", seed=1, kl=[0.5, 0.5])
    found = cells(tmp_path, "QuaRot")
    assert (found[FACTS].value, found[AVERAGE].value, found["KL"].value) == pytest.approx((50, 50, 0.3))


@pytest.mark.parametrize("other", [[1.0, 0.0], [1.0, 0.0, 1.0, 1.0]])
def test_items_that_differ_are_refused(tmp_path: Path, other: list[float]) -> None:
    put(tmp_path, {FACTS: [1.0, 0.0, 1.0]}, "rtn")
    put(tmp_path, {FACTS: other}, "star_quant")
    with pytest.raises(
        RecordError, match=r"items of testbed_facts differ from .*: .*rtn-.*\.json and .*star_quant-.*\.json"
    ):
        section(tmp_path, allow=["items"])
    with pytest.raises(RecordError, match=r"^items of testbed_facts: .*--allow items mixes them$"):
        section(tmp_path)


def test_items_that_differ_within_a_row_are_refused(tmp_path: Path) -> None:
    put(tmp_path, {FACTS: [1.0, 0.0, 1.0]}, "quarot", rotation=0)
    put(tmp_path, {FACTS: [1.0, 0.0]}, "quarot", rotation=1)
    with pytest.raises(RecordError, match="items of testbed_facts differ"):
        section(tmp_path, allow=["items"])


def test_missing_items_are_named(tmp_path: Path) -> None:
    path = put(tmp_path, {FACTS: [1.0, 0.0, 1.0]}, "rtn", kl=[0.1, 0.2])
    columns = path.with_suffix(".items") / "columns.json"
    whole = columns.read_text()
    columns.write_text(whole.replace('"acc,none"', '"other,none"'))
    edit_record(path, lambda data: None)
    with pytest.raises(RecordError, match=r"its items of testbed_facts have no acc \(none\)"):
        section(tmp_path)
    columns.write_text(whole.replace('"kl,none"', '"other,none"'))
    edit_record(path, lambda data: None)
    with pytest.raises(RecordError, match="its items of fidelity have no kl"):
        section(tmp_path)
    columns.write_text('{"schema_version": 1, "tasks": {}}')
    edit_record(path, lambda data: None)
    with pytest.raises(RecordError, match="has no items of testbed_facts"):
        section(tmp_path)


def test_groups_are_the_items_of_their_leaf_tasks(tmp_path: Path) -> None:
    """lm-eval weighs subjects by their number of items, and so do differences."""
    x, y = answers(1, 9), answers(2, 4)
    flip = [1 - value for value in y]
    put(tmp_path, {"mmlu_x": x, "mmlu_y": y}, "rtn", model="llada", groups=["mmlu"])
    path = put(tmp_path, {"mmlu_y": flip, "mmlu_x": x}, "star_quant", model="llada", groups=["mmlu"])
    for _ in range(2):
        found = cells(tmp_path, "RTN", model="LLaDA-8B")
        assert found["mmlu"].value == found[AVERAGE].value == pytest.approx(100 * sum(x + y) / 13)
        assert found[STAR].value == pytest.approx(100 * (sum(y) - sum(flip)) / 13)
        assert found["mmlu"].stderr == pytest.approx(100 * float(np.std(x + y)) / 13**0.5, rel=0.1)
        assert not {"mmlu_x", "mmlu_y"} & set(found)
        (path.with_suffix(".items") / "columns.json").unlink(missing_ok=True)  # from the rows themselves


def test_the_primary_metric_is_shown(tmp_path: Path) -> None:
    """Of gsm8k the flexible filter, which is not the record's first."""
    path = put(tmp_path, {"gsm8k": [1.0, 0, 0, 0]}, model="llada", metric="exact_match", filter_name="flexible-extract")
    strict = score("gsm8k", 0.9, "exact_match", "strict-match", n=4).model_dump()
    edit_record(path, lambda data: data["scores"].insert(0, strict))
    assert cells(tmp_path, "RTN", model="LLaDA-8B")["gsm8k"].value == 25


def test_kl_is_the_mean_of_all_runs_or_is_not_shown(tmp_path: Path) -> None:
    for seed, kl in enumerate(([0.1, 0.2, 0.9], [0.3, 0.1, 0.2])):
        put(tmp_path, {FACTS: answers(0)}, "rtn", kl=kl, seed=seed)
        put(tmp_path, {FACTS: answers(0)}, "awq", kl=kl if seed else None, seed=seed)
        put(tmp_path, {FACTS: answers(0)}, "quarot", kl=kl, rotation=seed, changes={"fidelity.positions": 4 + seed})
    found = cells(tmp_path, "RTN")["KL"]
    assert found.value == pytest.approx(0.3)
    assert found.stderr == pytest.approx(np.std([0.2, 0.15, 0.55]) / 3**0.5, rel=0.1)
    assert "KL" not in cells(tmp_path, "AWQ")  # one run has none
    assert "KL" not in cells(tmp_path, "QuaRot")  # of several trajectories
    assert section(tmp_path).columns == (FACTS, AVERAGE, "KL")


def test_an_average_needs_every_task(tmp_path: Path) -> None:
    put(tmp_path, {FACTS: answers(0), PROFILES: answers(1)}, "rtn")
    put(tmp_path, {FACTS: answers(0)}, "quarot")
    assert set(cells(tmp_path, "QuaRot")) == {FACTS}
    assert set(cells(tmp_path, "RTN")) == {FACTS, PROFILES, AVERAGE}


def test_a_task_that_was_left_out_has_an_empty_column_in_its_place(tmp_path: Path) -> None:
    """Averages and differences are those over the tasks that were scored."""
    values = {"arc_challenge": [1.0, 0.0, 1.0, 1.0], "piqa": [1.0, 0.0, 0.0, 0.0]}
    for method, bits in (("none", "w16a16"), ("rtn", "w4a4")):
        put(tmp_path / "a", values, method, bits, "llada", changes={"tasks.left_out": {"hellaswag": "why"}})
        put(tmp_path / "b", values, method, bits, "llada")
    found, other = section(tmp_path / "a", "LLaDA-8B"), section(tmp_path / "b", "LLaDA-8B")
    assert (found.left_out, other.left_out) == (("hellaswag",), ())
    ours = [column for column in found.columns if not column.endswith("(paper)")]
    assert ours == ["arc_challenge", "hellaswag", "piqa", AVERAGE, WHOLE_COLUMN]
    assert found.columns[3] == "hellaswag (paper)"
    assert found.rows == other.rows  # the same cells, none of hellaswag
    assert all("hellaswag" not in row for _, _, row in found.rows)
    assert cells(tmp_path / "a", "RTN", model="LLaDA-8B")[AVERAGE].value == pytest.approx(50)


def test_a_row_that_scored_what_others_left_out_is_compared_with_none_of_them(tmp_path: Path) -> None:
    for method, bits in (("none", "w16a16"), ("star_quant", "w4a4"), ("rtn", "w4a4")):
        put(tmp_path, {FACTS: [0.5, 0.5]}, method, bits, changes={"tasks.left_out": {PROFILES: "why"}})
    whole = {FACTS: [1.0, 1.0], PROFILES: [1.0, 0.0]}
    put(tmp_path, whole, "quarot")
    assert section(tmp_path).left_out == ()
    assert set(cells(tmp_path, "RTN")) == {FACTS}  # no average of some of the tasks
    assert set(cells(tmp_path, "QuaRot")) == {FACTS, PROFILES, AVERAGE}
    put(tmp_path, whole, "none", "w16a16")
    assert cells(tmp_path, "QuaRot")[to(WHOLE)] == Estimate(0, 0, 0, 0)
    assert cells(tmp_path, "full precision")[AVERAGE].value == pytest.approx(75)


def test_full_precision_scored_on_other_tasks_is_not_mixed_in(tmp_path: Path) -> None:
    put(tmp_path, {FACTS: [1.0, 0.0]}, "none", "w16a16")
    put(tmp_path, {FACTS: [1.0, 1.0], PROFILES: [1.0, 1.0]}, "none", "w16a16")
    put(tmp_path, {FACTS: [0.0, 0.0]}, "none", "w16a16", changes={"tasks.limit": 2})
    with pytest.raises(RecordError, match=r"full precision: .* are both its records; they differ in tasks"):
        section(tmp_path)
    put(tmp_path, {FACTS: [0.0, 0.0]}, "rtn")
    assert [(label, n) for label, n, _ in section(tmp_path).rows][:2] == [("full precision", 1), ("RTN", 1)]
    assert cells(tmp_path, "full precision")[FACTS].value == 50
    assert cells(tmp_path, "RTN")[to(WHOLE)].value == -50


def test_runs_that_score_no_task_stay_out_of_the_tables_of_tasks(tmp_path: Path) -> None:
    """Figure 3 brings runs of the same methods, with fidelity alone."""
    put(tmp_path, {}, "star_quant", kl=[0.1, 0.2])
    assert set(cells(tmp_path, "STaR-Quant")) == {"KL"}
    put(tmp_path, {FACTS: answers(0)}, "star_quant", kl=[0.1, 0.2])
    assert set(cells(tmp_path, "STaR-Quant")) == {FACTS, AVERAGE, "KL"}


def test_block_sizes_are_rows_of_their_own(tmp_path: Path) -> None:
    for block_size in (4, 16, 32):
        put(tmp_path, {FACTS: [block_size / 100]}, "star_quant", changes={"method.tac.block_size": block_size})
    rows = section(tmp_path, name="table3_tac_block_size").rows
    shown = {label: found[FACTS].value for label, _, found in rows if found}
    assert shown == pytest.approx({"g = 4": 4, "g = 16": 16, "g = 32": 32})
    (found,) = (found for label, _, found in section(tmp_path).rows if label == "STaR-Quant")
    assert found[FACTS].value == pytest.approx(16)
