"""Progress bars: drawn where asked for, nowhere else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from starquant.runs.execute import execute
from starquant.session.progress import SILENT, Progress, for_terminal
from starquant.session.session import Session
from tests.support.specs import spec

QUICK = ("method=rtn", "tasks.names=[testbed_facts]", "tasks.limit=4", "fidelity=none")


def test_a_bar_counts_what_is_iterated_over_or_updated(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress().bar([1, 2, 3], "walking", "block")) == [1, 2, 3]
    with Progress().bar(None, "answering", "request", total=5, initial=2) as bar:
        bar.update()
        assert bar.n == 3
    drawn = capsys.readouterr().err
    assert "walking: " in drawn
    assert "answering: " in drawn
    assert "2/5" in drawn
    assert "\n" not in drawn  # gone when finished


def test_the_silent_one_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(SILENT.bar([1, 2], "walking", "block")) == [1, 2]
    with SILENT.bar(None, "answering", "request", total=2) as bar:
        bar.update()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("terminal", "environment", "shown"),
    [(True, {}, True), (False, {}, False), (True, {"CI": "1"}, False), (True, {"TQDM_DISABLE": "1"}, False)],
)
def test_bars_are_for_a_person_who_watches(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, environment: dict[str, str], shown: bool
) -> None:
    for name in ("CI", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, setting in environment.items():
        monkeypatch.setenv(name, setting)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert for_terminal().shown is shown


def test_a_run_draws_bars_only_where_its_session_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = spec(*QUICK, "reuse=never", f"paths.results={tmp_path}")
    execute(run)
    assert capsys.readouterr() == ("", "")
    execute(run, Session(progress=Progress()))
    drawn = capsys.readouterr().err
    assert "quantize: " in drawn
    assert "testbed_facts: " in drawn
