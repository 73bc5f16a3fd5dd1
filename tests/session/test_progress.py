"""Progress bars: drawn where asked for, nowhere else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from starquant.runs.execute import execute
from starquant.session.progress import MOST_LOSSES, SILENT, Progress, for_terminal
from starquant.session.session import Session
from starquant.session.terminal import silence_libraries
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
    [
        (True, {}, (True, False)),
        (False, {}, (True, True)),
        (True, {"CI": "1"}, (True, True)),
        (True, {"TQDM_DISABLE": "1"}, (False, False)),
        (False, {"TQDM_DISABLE": "1"}, (False, True)),
    ],
)
def test_bars_are_for_a_person_who_watches_lines_for_a_log_and_neither_where_quiet_is_wanted(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, environment: dict[str, str], shown: tuple[bool, bool]
) -> None:
    for name in ("CI", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, setting in environment.items():
        monkeypatch.setenv(name, setting)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    silence_libraries()  # what it sets is no user's wish for quiet
    progress = for_terminal()
    assert (progress.shown, progress.plain) == shown
    assert bool(os.environ.get("TQDM_DISABLE")) is (progress.plain or not progress.shown)


def test_lines_are_sparse_and_plain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One a minute; the time left is that of what this run has done."""
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with Progress(plain=True).bar(None, "learn transform: block 3, qkv_input", "step", total=50, initial=10) as bar:
        for _ in range(20):
            clock[0] += 10.0
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "learn transform: block 3, qkv_input: 16 of 50 steps in 01:00, 05:40 left"
    assert len(lines) == 3


def test_who_hears_is_told_counts_and_some_losses_drawn_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[dict[str, float | str]] = []
    progress = Progress(shown=False, hear=lambda figures: heard.append(dict(figures)))
    with progress.bar(None, "gsm8k", "request", total=5, initial=2, counted=True) as bar:
        bar.update()
        bar.update(2)
    assert heard == [{"requests/gsm8k": 3}, {"requests/gsm8k": 5}]
    del heard[:]
    for step in range(100):
        progress.tell_loss("qkv_input", 2, step, 100, lambda: 0.5)
    assert len(heard) == MOST_LOSSES
    assert heard[0] == {"block": 2.05, "loss/qkv_input": 0.5}
    assert heard[-1]["block"] == 3.0
    SILENT.tell_loss("qkv_input", 2, 0, 1, pytest.fail)  # nobody hears: not even computed
    assert capsys.readouterr() == ("", "")


def test_a_run_draws_bars_only_where_its_session_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = spec(*QUICK, "reuse=never", f"paths.results={tmp_path}")
    execute(run)
    assert capsys.readouterr() == ("", "")
    execute(run, Session(progress=Progress()))
    drawn = capsys.readouterr().err
    assert "quantize: " in drawn
    assert "testbed_facts: " in drawn
