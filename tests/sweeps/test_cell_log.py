"""What became of a cell: running, done, failed, died, missing, whichever process ran it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from starquant.errors import ConfigError, RecordError
from starquant.sweeps import cell_log as cells
from starquant.sweeps.cell_log import CellEntry, CellLog
from tests.support.processes import end, start

KEY, NAME = "0123456789abcdef", "tiny:0 w4a4 rtn testbed"
HOLD = """
import sys
from pathlib import Path
from starquant.sweeps.cell_log import CellLog
with CellLog(Path(sys.argv[1])).running(sys.argv[2], "a cell"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def finished(results: Path, **more: object) -> CellEntry:
    """Run a cell to its end, with a record."""
    path = results / "records" / "a.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    entry = CellEntry(key=KEY, name=NAME, state="done", record="records/a.json", **more)
    with CellLog(results).running(KEY, NAME) as outcome:
        outcome.append(entry)
    return entry


def state(results: Path) -> str:
    return CellLog(results).read(KEY, NAME).state


def test_an_unknown_cell_is_missing(tmp_path: Path) -> None:
    assert CellLog(tmp_path).read(KEY, NAME) == CellEntry(key=KEY, name=NAME, state="missing")
    assert list(tmp_path.iterdir()) == []


def test_a_cell_is_running_and_then_done(tmp_path: Path) -> None:
    log = CellLog(tmp_path)
    with log.running(KEY, NAME) as outcome:
        assert log.read(KEY, NAME) == CellEntry(key=KEY, name=NAME, state="running")
        outcome.append(CellEntry(key=KEY, name=NAME, state="done", reused=True))
    found = log.read(KEY, NAME)
    assert found.seconds is not None and 0.0 <= found.seconds < 30.0
    assert found == CellEntry(key=KEY, name=NAME, state="done", reused=True, seconds=found.seconds)


def test_a_done_cell_whose_record_is_gone_is_missing(tmp_path: Path) -> None:
    finished(tmp_path)
    assert state(tmp_path) == "done"
    (tmp_path / "records" / "a.json").unlink()
    assert state(tmp_path) == "missing"


def test_a_done_cell_stays_done_while_it_is_looked_at_again(tmp_path: Path) -> None:
    finished(tmp_path)
    with CellLog(tmp_path).running(KEY, NAME):
        assert state(tmp_path) == "done"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("bits: got 5\nand more"), "bits: got 5"),
        (ValueError("a bug\nwith lines"), "ValueError: a bug"),
        (ZeroDivisionError(), "ZeroDivisionError: "),
    ],
)
def test_an_error_is_one_line_and_goes_on_its_way(tmp_path: Path, error: Exception, line: str) -> None:
    with pytest.raises(type(error)) as caught, CellLog(tmp_path).running(KEY, NAME):
        raise error
    assert caught.value is error
    found = CellLog(tmp_path).read(KEY, NAME)
    assert (found.state, found.error, found.record) == ("failed", line, None)
    assert found.seconds is not None


def test_an_interrupted_cell_has_died(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CellLog(tmp_path).running(KEY, NAME):
        raise KeyboardInterrupt
    assert state(tmp_path) == "died"


def test_a_killed_process_leaves_a_cell_that_has_died_and_can_be_run_again(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path, KEY)
    assert holder.stdout.readline() == "held\n"
    assert state(tmp_path) == "running"  # of another process
    holder.kill()
    end(holder)
    assert state(tmp_path) == "died"
    finished(tmp_path)
    assert state(tmp_path) == "done"


def test_a_cell_that_ends_while_it_is_read_has_not_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = CellLog(tmp_path)
    with log.running(KEY, NAME) as outcome:
        running = (tmp_path / "cells" / f"{KEY}.json").read_text()
        outcome.append(CellEntry(key=KEY, name=NAME, state="failed", error="x"))
    ended = (tmp_path / "cells" / f"{KEY}.json").read_text()
    (tmp_path / "cells" / f"{KEY}.json").write_text(running)

    def released(_: Path) -> bool:
        (tmp_path / "cells" / f"{KEY}.json").write_text(ended)
        return False

    monkeypatch.setattr(cells, "is_held", released)
    assert state(tmp_path) == "failed"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": "x"}', '{"state": "perhaps"}', "\0"])
def test_a_damaged_file_is_no_file(tmp_path: Path, text: str) -> None:
    finished(tmp_path)
    path = tmp_path / "cells" / f"{KEY}.json"
    whole = json.loads(path.read_text())
    damaged = json.dumps(whole | json.loads(text)) if text.startswith('{"state') else text
    path.write_text(damaged)
    assert state(tmp_path) == "missing"


def test_cells_are_told_apart(tmp_path: Path) -> None:
    finished(tmp_path)
    assert CellLog(tmp_path).read("f" * 16, NAME).state == "missing"


def test_a_full_disk_is_a_named_error_before_the_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    began = []
    message = rf"{tmp_path}/cells/{KEY}.json: cannot be written: No space left"
    with pytest.raises(RecordError, match=message), CellLog(tmp_path).running(KEY, NAME):
        began.append(KEY)
    assert not began
    assert list((tmp_path / "cells").iterdir()) == []
    assert state(tmp_path) == "missing"
