"""Weights & Biases hears of runs that failed: in a process of its own, within its time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from starquant.config.execution import TrackerSpec
from starquant.errors import DataError
from starquant.runs.execute import execute
from starquant.tracking.tracker import WandbTracker, marker_of
from tests.support.records import write_record
from tests.support.specs import spec
from tests.support.wandb_files import OfflineRun, offline_runs, records_of

PROJECT = "quant"
TRACKER = TrackerSpec(name="wandb", project=PROJECT, timeout_s=120.0)


def exit_code(run: OfflineRun) -> int:
    (path,) = run.folder.glob("*.wandb")
    (ended,) = [record.exit for record in records_of(path) if record.WhichOneof("record_type") == "exit"]
    return int(ended.exit_code)


def test_a_failed_run_is_a_run_in_state_failed_and_the_record_takes_its_place(tmp_path: Path) -> None:
    folder, run = tmp_path / "wandb", spec("method=rtn")
    tracker = WandbTracker(TRACKER, folder)
    marker = marker_of(folder, run.digest(), PROJECT, "offline")
    marker.parent.mkdir(parents=True)
    marker.write_text("of an earlier record")
    tracker.failed(run, DataError("corpus.txt:\n  no such file"))
    tracker.close()
    (failed,) = offline_runs(folder)[run.digest()]
    assert exit_code(failed) == 1
    assert failed.summary["error"] == "DataError: corpus.txt: no such file"
    assert failed.config["digest"] == run.digest()
    assert failed.config["bits.weights.bits"] == 4
    assert (failed.run.project, failed.run.job_type) == (PROJECT, "rtn")
    assert not marker.exists()
    assert not list((folder / "failed").iterdir())
    tracker.publish(write_record(tmp_path, {}, "method=rtn"))
    tracker.close()
    _, done = offline_runs(folder)[run.digest()]
    assert exit_code(done) == 0
    assert done.summary["error"] is None


def test_a_run_that_fails_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("starquant.runs.execute.evaluate_tasks", fails)
    few = ("tasks.names=[testbed_facts]", "fidelity=none", "tracker.timeout_s=120")
    with pytest.raises(RuntimeError, match="a bug"):
        execute(spec("method=rtn", "tracker=wandb", *few, f"paths.results={tmp_path}"))
    runs = offline_runs(tmp_path / "wandb").values()
    assert len(runs) == 2  # its full-precision twin was under way, and it cannot be without
    for (failed,) in runs:
        assert exit_code(failed) == 1
        assert failed.summary["error"] == "RuntimeError: a bug"


def test_telling_takes_no_longer_than_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = WandbTracker(TRACKER.model_copy(update={"timeout_s": 0.05}), tmp_path)
    began = time.monotonic()
    tracker.failed(spec("method=rtn"), DataError("x"))
    tracker.close()
    assert time.monotonic() - began < 5.0
    message = capsys.readouterr().err
    assert message.startswith("warning: W&B did not answer within 0.05 s ")
    assert message.endswith("; the run has failed\n")
    assert json.loads(next((tmp_path / "failed").iterdir()).read_text())["error"] == "DataError: x"


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    WandbTracker(TRACKER, tmp_path / "file" / "wandb").failed(spec("method=rtn"), DataError("x"))
    assert capsys.readouterr().err.startswith("warning: W&B was not told ")
