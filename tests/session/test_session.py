"""What the runs of one session keep for each other, and who hears of a run that fails."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from starquant.config.run import RunSpec
from starquant.errors import DataError, RecordError
from starquant.runs.execute import execute
from starquant.session.logs import on_terminal
from starquant.session.session import Session
from starquant.session.tracker import NullTracker
from starquant.sweeps.jobs import CellRunner
from tests.support.specs import spec

QUICK = ("tasks.names=[testbed_facts]", "tasks.limit=4", "reuse=never")


class Hearing(NullTracker):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.records: list[Path] = []
        self.failures: list[tuple[str, BaseException]] = []
        self.closed = 0

    def publish(self, record: Path) -> None:
        self.records.append(record)

    def failed(self, spec: RunSpec, error: BaseException) -> None:
        self.failures.append((spec.digest(), error))

    def close(self) -> None:
        self.closed += 1


def test_a_session_computes_full_precision_once_and_a_new_one_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session.open()

    def computed(method: str, session: Session) -> int:
        with on_terminal():
            execute(spec(f"method={method}", "fidelity=none", *QUICK, f"paths.results={tmp_path}"), session)
        return capsys.readouterr().err.count("running: tiny-w16a16-none")

    assert [computed("rtn", session), computed("quarot_rtn", session), computed("rtn", Session.open())] == [1, 0, 1]


def test_a_reference_serves_the_next_run_of_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from starquant.runs import fidelity

    taken = []
    take = fidelity.take_reference
    monkeypatch.setattr(fidelity, "take_reference", lambda *a, **k: taken.append(1) or take(*a, **k))
    few = ("fidelity=testbed", "fidelity.source.segments=4", "fidelity.resamples=10", *QUICK)
    session = Session.open()
    runs = [spec(f"method={method}", *few, f"paths.results={tmp_path}") for method in ("rtn", "quarot_rtn")]
    for run in runs:
        execute(run, session)
    assert len(taken) == 1
    execute(runs[0], Session.open())
    assert len(taken) == 2


def test_the_code_is_that_of_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session.open()
    run = spec("method=rtn", "fidelity=none", *QUICK[:2], f"paths.results={tmp_path}")
    execute(run, session)
    monkeypatch.setattr("starquant.store.provenance.CodeDigest.of", lambda *_: "other")
    assert execute(run, session).reused
    assert not execute(run).reused


def test_cells_of_a_process_share_a_session_that_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: list[Session] = []
    monkeypatch.setattr("starquant.sweeps.jobs._run_logged", lambda cell, session, _: sessions.append(session))
    runner = CellRunner()
    copies = [pickle.loads(pickle.dumps(runner)) for _ in range(2)]  # what a launcher sends with each job
    for run in (runner, runner, *copies):
        run(object())  # type: ignore[arg-type]
    assert sessions[0] is sessions[1] is runner.session
    assert pickle.loads(pickle.dumps(runner)).session is None
    assert sessions[2] is sessions[3] is not runner.session


@pytest.mark.parametrize("error", [DataError("corpus.txt: no such file"), RuntimeError("a bug"), SystemExit(3)])
def test_the_tracker_hears_of_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    tracker = Hearing()
    run = spec("method=gptq", "calibration.source.segments=4", "fidelity=none", *QUICK, f"paths.results={tmp_path}")
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr("starquant.runs.calibrate.make_states", fails)
        execute(run, Session(tracker=tracker))
    ((digest, heard),) = tracker.failures
    assert heard is error
    assert [path.name.split("-")[1] for path in tracker.records] == ["w16a16"]
    assert tracker.closed == 1
    result = execute(run, Session(tracker=tracker))
    assert result.record is not None
    assert result.record.digest == digest
    assert (len(tracker.failures), len(tracker.records)) == (1, 3)


def test_a_run_that_was_interrupted_or_never_began_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    tracker = Hearing()
    run = ("method=rtn", "fidelity=none", *QUICK)
    monkeypatch.setattr("starquant.runs.execute.evaluate_tasks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(spec(*run, f"paths.results={tmp_path}"), Session(tracker=tracker))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecordError):
        execute(spec(*run, f"paths.results={tmp_path}/file"), Session(tracker=tracker))
    assert not tracker.failures
