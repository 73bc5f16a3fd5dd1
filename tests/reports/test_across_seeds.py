"""Tables over model and rotation seeds: pairing by seeds and items, and the bootstrap behind their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starquant.errors import RecordError
from starquant.reports.across_seeds import main, read_rows, table
from starquant.statistics.bootstrap import crossed_bootstrap
from starquant.store.records import RecordStore
from tests.support.records import fidelity_rows, items_of, make_record, of_items, write_record
from tests.support.specs import spec

TASK = "testbed_facts"


def write(folder: Path, method: str, values: list[float], model: int = 0, rotation: int | None = None) -> Path:
    seeds = [f"model.seed={model}", *([] if rotation is None else [f"method.rotation_seed={rotation}"])]
    return write_record(folder, {TASK: items_of(values)}, f"method={method}", f"tasks.names=[{TASK}]", *seeds)


def test_runs_are_paired_by_both_seeds_and_by_item(tmp_path: Path) -> None:
    data = {0: ([1.0, 0, 1, 1], [0.0, 0, 1, 0]), 1: ([1.0, 1, 1, 1], [1.0, 0, 0, 0])}
    for rotation, (a, b) in data.items():
        write(tmp_path, "quarot", a, rotation=rotation)
        write(tmp_path, "quarot_rtn", b[::-1], rotation=1 - rotation)  # another rotation: not its partner
    rows = {row.label[-1]: row for row in read_rows(tmp_path)}
    (found,) = rows["quarot"].minus(rows["quarot_rtn"], (TASK, "acc"))
    expected = [np.subtract(data[0][0], data[1][1][::-1]), np.subtract(data[1][0], data[0][1][::-1])]
    np.testing.assert_array_equal(found, expected)


def test_a_method_without_rotation_is_paired_with_every_rotation(tmp_path: Path) -> None:
    write(tmp_path, "rtn", [0.0, 1, 0])
    for rotation, values in enumerate(([1.0, 1, 0], [0.0, 1, 1])):
        write(tmp_path, "quarot", values, rotation=rotation)
    rows = {row.label[-1]: row for row in read_rows(tmp_path)}
    (found,) = rows["quarot"].minus(rows["rtn"], (TASK, "acc"))
    np.testing.assert_array_equal(found, [[1, 0, 0], [0, 0, 1]])


def test_models_count_alike_whatever_their_number_of_runs(tmp_path: Path) -> None:
    for rotation in range(3):
        write(tmp_path, "quarot", [1.0, 1, 1, 1], model=0, rotation=rotation)
    write(tmp_path, "quarot", [0.0, 0, 0, 0], model=1, rotation=0)
    assert table(read_rows(tmp_path)).loc[0, "facts acc"].startswith("50.0 (")


def test_differences_are_points_with_an_interval(tmp_path: Path) -> None:
    write(tmp_path, "rtn", [0.0] * 8)
    write(tmp_path, "quarot", [1.0] * 8, rotation=0)
    found = table(read_rows(tmp_path), against="rtn").set_index("method")["facts acc"]
    assert found["quarot"] == "+100.0 [+100.0, +100.0]"
    assert found["rtn"] == ""


def test_two_records_of_one_row_and_seed_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "quarot", [1.0, 0], rotation=0)
    run = spec("method=quarot", "bits=w4a4", f"tasks.names=[{TASK}]", "method.qk_hadamard=true")
    items = {TASK: items_of([1.0, 0])}
    RecordStore(tmp_path).write(run, of_items(make_record(run), items), items)
    assert main([str(tmp_path)]) == 2
    assert "a second record of w4a4 quarot, model seed 0, rotation seed 0" in capsys.readouterr().err
    assert {row.label for row in read_rows(tmp_path, ["method.qk_hadamard"])} == {
        ("auto", "w4a4", "quarot"),
        ("True", "w4a4", "quarot"),
    }


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 7]])
def test_items_that_differ_are_refused(tmp_path: Path, ids: list[int]) -> None:
    write(tmp_path, "rtn", [0.0, 1, 0])
    run = spec("method=quarot", "bits=w4a4", f"tasks.names=[{TASK}]")
    items = [item | {"doc_id": i} for item, i in zip(items_of([0.0] * len(ids)), ids, strict=True)]
    RecordStore(tmp_path).write(run, of_items(make_record(run), {TASK: items}), {TASK: items})
    with pytest.raises(RecordError, match="items of testbed_facts differ"):
        table(read_rows(tmp_path), against="rtn")


def test_fidelity_of_other_prompts_is_not_compared(tmp_path: Path) -> None:
    for method, split in (("rtn", "test"), ("quarot", "validation")):
        run = spec(f"method={method}", "bits=w4a4", f"tasks.names=[{TASK}]", f"fidelity.source.split={split}")
        record = make_record(run)
        kl = record.scores[0].model_copy(update={"task": "fidelity", "metric": "kl", "filter": "all", "unit": "nats"})
        items = {TASK: items_of([0.0, 1]), "fidelity": fidelity_rows([[1.0], [2.0]])}
        record = record.model_copy(update={"scores": [*record.scores, kl]})
        RecordStore(tmp_path).write(run, of_items(record, items), items)
    with pytest.raises(RecordError, match="items of fidelity differ"):
        table(read_rows(tmp_path), against="rtn")


def test_the_number_of_pairs_is_shown(tmp_path: Path) -> None:
    for model in (0, 1):
        write(tmp_path, "quarot", [1.0, 0], model=model, rotation=0)
    write(tmp_path, "quarot_rtn", [1.0, 0], model=0, rotation=0)
    found = table(read_rows(tmp_path), against="quarot").set_index("method")
    assert found.loc["quarot_rtn", "pairs"] == 1


def test_an_unknown_method_and_an_empty_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    write(tmp_path, "rtn", [0.0, 1])
    assert main([str(tmp_path), "--against", "quarto"]) == 2
    out = capsys.readouterr().err
    assert "holds no record" in out
    assert "--against: got 'quarto', allowed: rtn" in out


def test_the_crossed_bootstrap_knows_both_sources_of_noise() -> None:
    """values = run effect + item effect: the variance of the mean is that of both, divided by their numbers."""
    rng = np.random.default_rng(0)
    runs, items = rng.normal(0, 2, (8, 1)), rng.normal(0, 3, (1, 200))
    found = crossed_bootstrap([runs + items], resamples=4000)
    expected = np.sqrt(runs.var() / 8 + items.var() / 200)
    assert found.mean == pytest.approx((runs + items).mean())
    assert found.stderr == pytest.approx(expected, rel=0.05)
    assert found.low < found.mean < found.high


def test_models_scored_on_the_same_items_are_no_new_items() -> None:
    values = np.random.default_rng(0).normal(size=(4, 100))
    one, three = crossed_bootstrap([values]), crossed_bootstrap([values] * 3)
    assert three.stderr == pytest.approx(one.stderr, rel=1e-9)


@pytest.mark.parametrize("bad", [[], [np.zeros(4)], [np.zeros((2, 1))], [np.full((2, 3), np.nan)]])
def test_the_crossed_bootstrap_refuses_what_it_cannot_resample(bad: Any) -> None:
    with pytest.raises(ValueError, match="a bootstrap needs"):
        crossed_bootstrap(bad)
