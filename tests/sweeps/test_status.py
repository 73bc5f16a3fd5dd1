"""How a sweep stands and how it ended: the status command, the summary, the bar, exit codes."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from starquant.errors import ConfigError
from starquant.sweeps import command_line, status
from starquant.sweeps import progress as watching
from starquant.sweeps.cell_log import CellEntry, CellLog
from starquant.sweeps.cells import Cell, Plan
from starquant.sweeps.command_line import plan_of
from starquant.sweeps.progress import SweepBar, summary
from starquant.sweeps.status import main
from starquant.sweeps.sweeper import CellSweeper
from tests.support.paths import REPOSITORY
from tests.support.sweeps import Runner

BITS = ("w3a3", "w4a4", "w4a8", "w8a8")


def sweep(results: Path, *bits: str) -> list[str]:
    return ["-m", f"bits={','.join(bits)}", "method=rtn", f"paths.results={results}"]


def planned(arguments: list[str]) -> Plan:
    return _planned(tuple(arguments))


@functools.cache
def _planned(arguments: tuple[str, ...]) -> Plan:
    found = plan_of(arguments)
    assert found is not None
    return found


def end(results: Path, cell: Cell, state: str, **more: Any) -> CellEntry | None:
    """Leave a cell as a process would; died: neither an end nor a lock."""
    with CellLog(results).running(cell.key, cell.name) as outcome:
        if state == "done":
            record = results / "records" / f"{cell.key}.json"
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text("{}")
            more["record"] = record.relative_to(results).as_posix()
        if state != "died":
            outcome.append(CellEntry(key=cell.key, name=cell.name, state=state, **more))
    return outcome[-1] if outcome else None


def entry(name: str, state: str, **more: Any) -> CellEntry:
    return CellEntry(key=name, name=name, state=state, **more)


def test_status_shows_every_cell_and_is_1_until_all_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = sweep(tmp_path, *BITS)
    three, four, mixed, eight = planned(arguments).cells
    end(tmp_path, eight, "done")
    end(tmp_path, mixed, "failed", error="bits: a bad one")
    end(tmp_path, three, "died")
    monkeypatch.setattr(status, "plan_of", planned)  # made once
    assert main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(maxsplit=5) for line in lines[:-1]]
    assert [(row[0], row[2]) for row in rows] == [
        ("done", "w8a8"),
        ("failed", "w4a8"),
        ("died", "w3a3"),
        ("missing", "w4a4"),
    ]
    assert [row[5:] for row in rows] == [[f"records/{eight.key}.json"], ["bits: a bad one"], [], []]
    assert lines[-1] == "4 cells: 1 done, 1 failed, 1 died, 1 missing"
    for cell in (three, four, mixed):
        end(tmp_path, cell, "done")
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 cells: 4 done"
    (tmp_path / "records" / f"{four.key}.json").unlink()
    assert main(arguments) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "4 cells: 3 done, 1 missing"


def test_status_shows_what_is_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = sweep(tmp_path, "w4a4", "w8a8")
    first, _ = planned(arguments).cells
    with CellLog(tmp_path).running(first.key, first.name):
        assert main(arguments) == 1
    out = capsys.readouterr().out
    assert out.startswith("running  tiny:0 w4a4 rtn testbed")
    assert "2 cells: 1 running, 1 missing" in out


def test_watching_shows_every_change_and_ends_with_the_code_of_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until nothing runs or is missing; a terminal is cleared in between; what is the same is not shown again."""
    arguments = sweep(tmp_path, "w4a4", "w8a8")
    first, second = planned(arguments).cells
    monkeypatch.setattr(status, "plan_of", planned)
    happens = [
        lambda: end(tmp_path, first, "done"),
        lambda: None,
        lambda: end(tmp_path, second, "failed", error="bits: a bad one"),
    ]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        happens.pop(0)()

    monkeypatch.setattr(status.time, "sleep", sleep)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main([*arguments, "--watch", "0.5"]) == 1
    drawn = capsys.readouterr().out.split(status.CLEAR)[1:]
    counts = [screen.splitlines()[-1] for screen in drawn]
    assert counts == ["2 cells: 2 missing", "2 cells: 1 done, 1 missing", "2 cells: 1 done, 1 failed"]
    assert slept == [0.5] * 3
    end(tmp_path, second, "done")
    assert main(["--watch", *arguments]) == 0
    assert slept == [0.5] * 3  # it was done


def test_watching_ends_clean_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", interrupted)
    assert main([*sweep(tmp_path, "w4a4"), "--watch=1"]) == 130
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.endswith("1 cells: 1 missing\n")


def test_status_of_an_experiment_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["model=tiny", "method=rtn,quarot_rtn", f"paths.results={tmp_path}"]
    for cell in planned(["experiment=table5_w8a8", *more]).cells:
        end(tmp_path, cell, "done")
    assert main(["table5_w8a8", *more]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 cells: 2 done"
    assert main(["table5_w8a8", "seed=1", *more]) == 1
    assert not list((tmp_path / "cells").glob("*.lock"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["model=tiny", "tabel1_main"],
            "error: experiment: got 'tabel1_main', allowed: block_diffusion, figure1_activations, ",
        ),
        (["table5_w8a8", "model=tinny"], "error: model: got 'tinny', allowed: "),
        (["bits=w8a8,w4a4"], "error: bits: got several values"),
        (["--cfg", "job"], "error: usage: starquant status "),
        (["table5_w8a8", "--watch=soon"], "error: --watch: got 'soon', allowed: seconds, 0.1 or more"),
        (["table5_w8a8", "--watch", "0"], "error: --watch: got '0', allowed: seconds, 0.1 or more"),
    ],
)
def test_status_is_2_after_bad_input(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, f"paths.results={tmp_path}"]) == 2
    found = capsys.readouterr()
    assert found.err.startswith(message)
    assert (found.out, list(tmp_path.iterdir())) == ("", [])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["table1_main", "-h"]])
def test_status_says_how_it_is_used(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "usage: starquant status EXPERIMENT|-m [KEY=VALUE ...]" in out
    assert "experiments: block_diffusion, figure1_activations, " in out
    assert "none" not in out.splitlines()[-1]


def test_status_of_what_is_done_needs_no_torch(tmp_path: Path) -> None:
    words = ["-m", "bits=w4a4,w8a8", "method=none", f"paths.results={tmp_path}"]
    for cell in planned(words).cells:
        end(tmp_path, cell, "done")
    code = "import sys; from starquant.sweeps.status import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, *words], cwd=REPOSITORY, capture_output=True).returncode == 0


def test_status_shows_what_would_be_refused_and_each_reason_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A group size that does not divide, as the sweep itself is refused for; nothing is written."""
    (tmp_path / "text.txt").write_text("")
    bad = ("bits.weights.group_size=null,7", "method=rtn,smoothquant", f"paths.results={tmp_path}")
    text = ("calibration.source.kind=text", f"calibration.source.path={tmp_path / 'text.txt'}")
    words = ["-m", "bits=w4a4", *bad, *text]
    done = next(cell for cell in planned(words).cells if cell.spec.bits.weights.group_size is None)
    end(tmp_path, done, "done")
    before = sorted(tmp_path.rglob("*"))
    assert main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=5)[0] for line in lines] == ["done", *3 * ["refused"], "4"]
    reasons = [line.split(maxsplit=5)[5] for line in lines[1:-1]]
    assert sum("group_size: got 7, which does not divide" in reason for reason in reasons) == 1
    assert sum("text.txt: holds no text" in reason for reason in reasons) == 1
    assert sum(reason.startswith("as tiny:0 w4a4 ") for reason in reasons) == 1
    assert lines[-1] == "4 cells: 1 done, 3 refused"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_summary_counts_and_names_what_did_not_end_well() -> None:
    found = summary(
        [
            entry("a", "missing"),
            entry("b", "done"),
            entry("c", "failed", error="bits: got 5"),
            entry("d", "done", reused=True),
            entry("e", "died"),
            entry("f", "running"),
            entry("g", "failed", error="other"),
        ]
    )
    assert found.splitlines() == [
        "7 cells: 2 done (1 there already), 2 failed, 1 died, 1 running, 1 missing",
        "  missing: a",
        "  failed: c: bits: got 5",
        "  died: e",
        "  running: f",
        "  failed: g: other",
    ]
    assert summary([entry("a", "done"), entry("b", "done")]) == "2 cells: 2 done"
    assert summary([entry("a", "failed", error="x", reused=True)]) == "1 cells: 1 failed\n  failed: a: x"


class FakeBar:
    """A bar that remembers what it was made for and what it showed last."""

    made: list[FakeBar] = []  # noqa: RUF012

    def __init__(self, total: int, **_: object) -> None:
        self.total, self.n, self.text, self.drawn = total, 0, "", 0
        FakeBar.made.append(self)

    def __enter__(self) -> FakeBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        self.text, self.drawn = text, self.drawn + 1

    def shown(self) -> tuple[int, str]:
        """What it shows once it has looked again, twice: the first look may have begun before."""
        wanted, deadline = self.drawn + 2, time.monotonic() + 20
        while self.drawn < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        assert self.drawn >= wanted
        return self.n, self.text


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[FakeBar]:
    monkeypatch.setattr(watching, "tqdm", FakeBar)
    monkeypatch.setattr(watching, "POLL_S", 0.005)
    FakeBar.made = []
    return FakeBar.made


def test_the_bar_counts_only_what_this_sweep_has_changed(tmp_path: Path, bars: list[FakeBar]) -> None:
    cells = planned(sweep(tmp_path, *BITS)).cells
    three, four, mixed, eight = cells
    end(tmp_path, three, "done")
    end(tmp_path, four, "failed", error="of the last sweep")
    log = CellLog(tmp_path)
    with SweepBar(log, cells, enabled=True):
        while not bars:
            time.sleep(0.005)
        (bar,) = bars
        assert bar.total == 4
        assert bar.shown() == (0, "")  # both ended before
        with log.running(mixed.key, mixed.name) as outcome:
            assert bar.shown() == (0, mixed.name)
            outcome.append(CellEntry(key=mixed.key, name=mixed.name, state="done"))
        assert bar.shown() == (1, "")
        end(tmp_path, eight, "failed", error="x")
        assert bar.shown() == (2, "1 failed, ")
        with log.running(four.key, four.name) as outcome:
            assert bar.shown() == (2, f"1 failed, {four.name}")
            outcome.append(CellEntry(key=four.key, name=four.name, state="done", reused=True))
        assert bar.shown() == (3, "1 failed, ")
    drawn = bar.drawn
    time.sleep(0.05)
    assert bar.drawn == drawn  # nobody watches any more


def test_a_bar_that_is_not_enabled_looks_at_nothing(bars: list[FakeBar]) -> None:
    class Unread:
        def read(self, *_: str) -> CellEntry:
            raise AssertionError("read")

    with SweepBar(Unread(), [entry("a", "missing")], enabled=False) as bar:  # type: ignore[arg-type]
        assert bar._thread is None
        time.sleep(0.03)
    assert bars == []


def test_a_sweep_is_summed_up_whatever_its_cells_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = sweep(tmp_path, *BITS)
    three, four, mixed, _ = planned(arguments).cells
    launched: list[Plan] = []

    def launch(self: CellSweeper, plan: Plan) -> list[CellEntry | None]:
        launched.append(plan)
        return [
            end(tmp_path, three, "done", reused=True),
            end(tmp_path, four, "done"),
            end(tmp_path, mixed, "failed", error="bits: a bad one"),
        ]

    monkeypatch.setattr(CellSweeper, "launch", launch)
    assert command_line.main(arguments) == 1
    assert capsys.readouterr().err.splitlines() == [
        "4 cells: 2 done (1 there already), 1 failed, 1 missing",
        "  failed: tiny:0 w4a8 rtn testbed: bits: a bad one",
        "  missing: tiny:0 w8a8 rtn testbed",
    ]
    assert [plan.cells for plan in launched] == [planned(arguments).cells]


def failing() -> None:
    raise ConfigError("model: not there")


def interrupted() -> None:
    raise KeyboardInterrupt


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)


@pytest.mark.parametrize(
    ("state", "code", "message"),
    [
        ("done", 0, "note: "),  # the runner's record is none that a page could be made of
        ("failed", 1, ""),
        (failing, 2, "error: model: not there"),
        (interrupted, 130, "interrupted: "),
        (terminated, 143, "interrupted: "),
    ],
)
def test_exit_code_of_a_single_run(
    state: Any,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        command_line,
        "CellRunner",
        lambda: Runner(lambda cell: state() if callable(state) else end(tmp_path, cell, state)),
    )
    assert command_line.main(["bits=w8a8", "method=rtn", f"paths.results={tmp_path}"]) == code
    err = capsys.readouterr().err
    assert message in err
    assert bool(err) == bool(message)  # no summary of a single run
    assert signal.getsignal(signal.SIGTERM) == handler
