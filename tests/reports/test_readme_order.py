"""README and quick start: what their commands leave behind, in order, makes every table and no row twice."""

from __future__ import annotations

import random
import shlex
from pathlib import Path

import numpy as np
import pytest

from starquant.config.run import RunSpec
from starquant.reports.__main__ import main
from starquant.reports.definitions import TABLES
from starquant.store.records import RecordStore
from starquant.sweeps.cells import Plan
from starquant.sweeps.command_line import plan_of
from tests.support.paths import REPOSITORY
from tests.support.records import make_record
from tests.support.tables import rows_of, score

ELSEWHERE = ("model=llada", "model=dream", "smol", "stage=inspect", "figure1", "--cfg")


def plans() -> list[Plan]:
    """The runs of the embedded model of README and quick start, in a reader's order."""
    pages = [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "docs/quick-start.md")]
    lines = [line for page in pages for line in page.splitlines()]
    runs = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith(".venv/bin/python run.py")]
    words = [[word for word in run if not word.startswith("launcher=")] for run in runs]
    return [plan for run in words if not any(part in " ".join(run) for part in ELSEWHERE) and (plan := plan_of(run))]


def put(folder: Path, run: RunSpec) -> None:
    """A record whose answers depend on what was run, not on which other tasks were."""
    values = {}
    for task in run.tasks.names:
        key = (task, run.method.model_dump_json(), run.bits.name, run.model.seed)
        draw = random.Random(repr(key))
        values[task] = [float(draw.random() < 0.7) for _ in range(24)][: run.tasks.limit]
    scores = [score(task, float(np.mean(own)), n=len(own)) for task, own in values.items()]
    record = make_record(run).model_copy(
        update={"digest": run.digest(), "scores": scores, "provenance": {"git_dirty": False}}
    )
    RecordStore(folder).write(run, record, {task: rows_of(task, own) for task, own in values.items()})


def test_every_table_is_built_from_what_the_readmes_commands_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = plans()
    specs = [cell.spec.canonical() for plan in own for cell in plan.cells]
    assert len(own) >= 8
    assert {16, None} == {run.tasks.limit for run in specs}
    assert any(run.export.dir for run in specs)
    for run in specs:
        put(tmp_path, run)
        if run.tasks.names:
            put(tmp_path, run.baseline())
    assert main([*TABLES, "--records", str(tmp_path)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: ") for line in said)
    assert "note: table1_main: 2 records with tasks.limit left out (--where tasks.limit=16 takes those)" in said
    text = (tmp_path / "tables" / "table1_main.md").read_text(encoding="utf-8")
    tiny = text.partition("## LLaDA-8B")[0]
    assert "| items |  | 24 | 24 | 24 | 24 |" in tiny
    rows = {line.split("|")[1].strip(): line for line in tiny.splitlines() if line.startswith("| ")}
    assert all(f"| {name} | 1 | " in line for name, line in rows.items() if name not in ("", "---", "items"))
    assert len(rows) == 2 + 11 + 1
