"""The log: what a user waits for and warnings on the terminal, everything in a file beside the record."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from starquant.errors import DataError, RecordError
from starquant.reports.publish import publish
from starquant.runs.execute import execute
from starquant.session.logs import FILE_ONLY, in_file, on_terminal
from starquant.store.source import record_paths
from tests.support.specs import spec

QUICK = ("method=rtn", "tasks.names=[testbed_facts]", "tasks.limit=4", "fidelity=none")
LEARNED = ("method=gptq", "calibration.source.segments=4", *QUICK[1:])
log = logging.getLogger("starquant.store.somewhere")


def say_everything() -> None:
    log.debug("a detail")
    log.info("running: it")
    log.warning("%s is odd", "it")
    log.error("failed", extra=FILE_ONLY)


def test_the_terminal_shows_lines_and_warnings_and_the_file_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "logs" / "run.log"
    with on_terminal(), on_terminal(), in_file(path):
        say_everything()
    assert capsys.readouterr() == ("", "running: it\nwarning: it is odd\n")
    lines = [line.split(" ", 2)[2] for line in path.read_text().splitlines()]
    where = "starquant.store.somewhere"
    assert lines == [
        f"DEBUG {where}: a detail",
        f"INFO {where}: running: it",
        f"WARNING {where}: it is odd",
        f"ERROR {where}: failed",
    ]
    say_everything()
    assert len(path.read_text().splitlines()) == 4  # closed
    with in_file(path):
        log.info("goes on")
    assert len(path.read_text().splitlines()) == 5  # appended


def test_other_processes_than_the_first_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with on_terminal(shown=False), on_terminal(), in_file(None):
        say_everything()
    assert capsys.readouterr() == ("", "")


def test_handlers_of_the_root_logger_do_not_repeat_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    with on_terminal():
        say_everything()
    assert not caplog.records
    log.warning("it is odd")
    assert caplog.messages == ["it is odd"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("mine")
    with (
        pytest.raises(RecordError, match=rf"{tmp_path}/logs/run\.log: cannot be written: "),
        in_file(tmp_path / "logs" / "run.log"),
    ):
        pass


def test_the_log_lies_beside_the_record_and_is_none(tmp_path: Path) -> None:
    run = spec(*QUICK, f"paths.results={tmp_path / 'results'}")
    result = execute(run)
    path = result.path.with_suffix(".log")
    assert path.read_text().count("INFO starquant.runs: running: ") == 2  # full precision, too
    execute(run)
    assert path.read_text().count("INFO starquant.runs.record: reused: ") == 2
    assert len(list(result.path.parent.glob("*.log"))) == 1
    assert sorted(record_paths(tmp_path / "results")) == sorted(result.path.parent.glob("*.json"))
    assert publish(tmp_path / "results", tmp_path / "published") == 2
    assert not list((tmp_path / "published").rglob("*.log"))


def test_a_run_without_a_record_has_its_log_among_the_logs(tmp_path: Path) -> None:
    result = execute(spec(*LEARNED, "stage=calibrate", f"paths.results={tmp_path}"))
    (path,) = (tmp_path / "logs").iterdir()
    assert path.name == f"calibrate-tiny-w4a4-gptq-{result.path.name}.log"
    assert not list((tmp_path / "records").iterdir())


def test_the_log_of_a_failed_run_says_why_and_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise DataError("corpus.txt: no such file")

    run = spec(*LEARNED, f"paths.results={tmp_path}")
    with monkeypatch.context() as patch, on_terminal(), pytest.raises(DataError):
        patch.setattr("starquant.runs.calibrate.make_states", missing)
        execute(run)
    assert "no such file" not in capsys.readouterr().err  # the command line's to print
    (path,) = tmp_path.glob("records/*-gptq-*.log")
    text = path.read_text()
    assert "ERROR starquant.runs: failed: corpus.txt: no such file\nTraceback " in text
    result = execute(run)
    assert result.path.with_suffix(".log") == path
    assert path.read_text().startswith(text)
