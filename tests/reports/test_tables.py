"""Records to DataFrames, and the committed notebooks and records."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from starquant.errors import RecordError
from starquant.reports.comparison import comparison, main, markdown
from starquant.reports.frame import pivot, scores_frame
from starquant.store.compact import RECORDS
from starquant.store.records import RecordStore
from tests.support.paths import REPOSITORY
from tests.support.records import make_record
from tests.support.specs import spec

WITH_FIGURES = {"figure1_activations.ipynb", "figure3_trajectory.ipynb", "smol_main.ipynb"}


def test_one_row_a_score(tmp_path: Path) -> None:
    for overrides, value in ((["bits=w4a4"], 0.25), (["bits=w8a8"], 0.75)):
        run = spec(*overrides)
        RecordStore(tmp_path).write(run, make_record(run, value))
    frame = scores_frame(tmp_path)
    assert frame[["bits", "value", "n"]].to_dict("records") == [
        {"bits": "w4a4", "value": 0.25, "n": 8},
        {"bits": "w8a8", "value": 0.75, "n": 8},
    ]
    table = pivot(frame)
    assert table.loc[("tiny", "w8a8", "rtn", 0), ("testbed_facts", "acc", "none")] == 75.0


def test_no_records_give_an_empty_table(tmp_path: Path) -> None:
    assert scores_frame(tmp_path).empty


def test_damaged_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RecordError, match=r"bad\.json"):
        scores_frame(tmp_path)


def test_published_records_are_clean_and_whole() -> None:
    """What the README shows was computed from committed code, on all items; on 64 a task where it says so."""
    folders = sorted(path.parent for path in (REPOSITORY / "results" / "published").rglob(RECORDS))
    assert len(folders) > 10
    frame = pd.concat(scores_frame(folder).assign(folder=folder.name) for folder in folders)
    assert not frame["git_dirty"].any()
    of_tasks = frame["folder"] == "smol_tasks"
    assert frame["limit"][~of_tasks].isna().all() and (frame["limit"][of_tasks] == 64).all()


def test_published_results_are_small() -> None:
    files = [path for path in (REPOSITORY / "results" / "published").rglob("*") if path.is_file()]
    assert len(files) < 200 and sum(path.stat().st_size for path in files) < 8e6


def test_paper_figures_are_readable() -> None:
    files = sorted((REPOSITORY / "results" / "paper").glob("*.csv"))
    assert len(files) == 5
    assert all(len(pd.read_csv(file)) > 0 for file in files)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_run_and_carry_no_output(path: Path, monkeypatch) -> None:
    monkeypatch.chdir(path.parent)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    assert len(code.splitlines()) < 30
    outputs: list[dict[str, object]] = []
    exec(compile(code, path.name, "exec"), {"__name__": "__main__", "display": lambda x: outputs.append(shown(x))})
    images = [output["image/png"] for output in outputs if "image/png" in output]
    assert bool(images) is (path.name in WITH_FIGURES)
    assert all(bytes(image).startswith(b"\x89PNG") and len(image) > 10_000 for image in images)


def shown(value: object) -> dict[str, object]:
    """What a notebook keeps of a value that is displayed: IPython asks it for each kind by a method of this name."""
    methods = {"text/html": "_repr_html_", "image/png": "_repr_png_"}
    return {kind: getattr(value, method)() for kind, method in methods.items() if hasattr(value, method)}


def test_comparison_is_one_row_a_method_with_standard_errors(tmp_path: Path) -> None:
    for overrides, value in ((["bits=w4a4"], 0.25), (["bits=w4a4", "method=quarot"], 0.75)):
        run = spec(*overrides)
        record = make_record(run, value)
        kl = record.scores[0].model_copy(update={"task": "fidelity", "metric": "kl", "unit": "nats", "stderr": 0.5})
        binned = kl.model_copy(update={"filter": "mask_ratio_0.00_0.25", "value": 9.0})
        kl = kl.model_copy(update={"filter": "all"})
        RecordStore(tmp_path).write(run, record.model_copy(update={"scores": [*record.scores, kl, binned]}))
    lines = markdown(comparison(scores_frame(tmp_path))).splitlines()
    assert lines[0] == "| bits | method | facts acc | kl | n |"
    assert [line.split(" | ")[1] for line in lines[2:]] == ["quarot", "rtn"]
    assert lines[2].startswith("| w4a4 | quarot | 75.0")
    assert lines[2].endswith("| 0.75 (0.5) | 8 |")


def test_comparison_refuses_rows_that_only_a_digest_tells_apart(tmp_path: Path, capsys) -> None:
    for clip in (1.0, 0.9):
        run = spec(f"bits.weights.clip_ratio={clip}")
        RecordStore(tmp_path).write(run, make_record(run, 0.5))
    assert main([str(tmp_path)]) == 2
    assert "tiny, w4a4, rtn, 0: several records share this row" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
