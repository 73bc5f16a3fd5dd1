"""Kills, full disks, damage, two sweeps at once: nothing finished is lost, nothing is counted twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from starquant.errors import RecordError
from starquant.reports.experiments import build
from starquant.runs.execute import execute
from starquant.store.artifacts import ArtifactStore
from tests.support.command_line import ENVIRONMENT, RUN, run_in_process
from tests.support.paths import REPOSITORY
from tests.support.records import edit_record
from tests.support.specs import spec

QUICK = ("tasks.names=[testbed_facts]", "tasks.limit=8", "fidelity=none", "runtime.threads=1")
LEARNED = ("method=star_quant", "method.transform.steps=8", "calibration.source.segments=16", *QUICK)


def killed_when(command: list[str], happened: Callable[[], bool], seconds: float = 180) -> None:
    """Start a process and SIGKILL it once something has happened."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_while_calibrating(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run fits only the blocks that are missing, and ends with the same tensors, byte for byte."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = spec(*LEARNED, "stage=calibrate", f"paths.results={whole}")
    made = execute(run)
    command = [*RUN, *LEARNED, "stage=calibrate", f"paths.results={broken}"]
    killed_when(command, lambda: bool(list(broken.glob("unfinished/*/*/block_001.safetensors"))))
    assert not (broken / "artifacts").exists()
    first = next(broken.glob("unfinished/*/*/block_000.safetensors"))
    written = first.stat().st_mtime_ns
    capsys.readouterr()
    again = execute(spec(*LEARNED, "stage=calibrate", f"paths.results={broken}"))
    assert "going on from an interrupted calibration" in capsys.readouterr().err
    ours, theirs = (ArtifactStore(r).find(result.path.name) for r, result in ((whole, made), (broken, again)))
    assert ours is not None
    assert theirs is not None
    parts = [name for name in ours.files if name.endswith(".safetensors")]
    assert len(parts) == 5
    assert {name: ours.files[name] for name in parts} == {name: theirs.files[name] for name in parts}
    assert (again.path / first.name).stat().st_mtime_ns == written
    assert not list(broken.glob("unfinished/*"))


@pytest.mark.slow  # two processes to the end; its like is tested by default
def test_killed_while_the_record_is_written(tmp_path: Path) -> None:
    """No half record is left; the next run repeats no answer and finishes."""
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal, sys\n"
        "replace = os.replace\n"
        "def dies(a, b):\n"
        "    if str(b).endswith('.json') and '-rtn-' in str(b): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(a, b)\n"
        "os.replace = dies\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from starquant.sweeps.command_line import main\n"
        "sys.exit(main())\n"
    )
    results = tmp_path / "results"
    command = [sys.executable, str(script), "method=rtn", *QUICK, f"paths.results={results}"]
    assert subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == -signal.SIGKILL
    assert [path.name.split("-")[1] for path in results.glob("records/*.json")] == ["w16a16"]
    answers = next(results.glob("unfinished/*/*/testbed_facts.jsonl"))
    assert len(answers.read_text().splitlines()) > 8
    before = answers.stat()
    seen = []

    remove = shutil.rmtree

    def watch(path: object, *rest: Any, **more: Any) -> None:
        if str(path) == str(answers.parents[1]):
            seen.append(answers.stat().st_mtime_ns == before.st_mtime_ns)
        remove(path, *rest, **more)

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(shutil, "rmtree", watch)  # as the last step before answers go
        result = execute(spec("method=rtn", *QUICK, f"paths.results={results}"))
    assert seen[-1]
    assert result.record is not None
    assert result.path.exists()


def test_a_full_disk_stops_the_run_with_one_error_and_loses_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def full(handle: int) -> None:
        if "-rtn-" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        sync(handle)

    run = spec("method=rtn", *QUICK, f"paths.results={tmp_path}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RecordError, match=r"-rtn-.*cannot be written: .*No space left"):
            execute(run)
    assert not list(tmp_path.glob("records/*-rtn-*.json"))
    assert list(tmp_path.glob("unfinished/*/*/testbed_facts.jsonl"))
    assert execute(run).path.exists()


def test_a_disk_that_fills_up_while_calibrating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    run = spec(*LEARNED, "stage=calibrate", f"paths.results={tmp_path}")
    with monkeypatch.context() as patch:
        patch.setattr("starquant.methods.fitted.save_file", full)
        with pytest.raises(RecordError, match=r"ends\.safetensors: cannot be written: .*No space left"):
            execute(run)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.slow  # two processes to the end; its like is tested by default
def test_two_sweeps_in_one_folder_compute_everything_once(tmp_path: Path) -> None:
    command = [*RUN, "-m", "method=rtn,smoothquant", *QUICK, f"paths.results={tmp_path}"]
    both = [subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=-1, stderr=-1) for _ in range(2)]
    told = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    started = [line.split("running: ")[1] for text in told for line in text.splitlines() if "running: " in line]
    assert len(started) == len(set(started)) == 3, told
    assert all("2 cells: 2 done" in text for text in told)
    assert len(list(tmp_path.glob("records/*.json"))) == 3
    assert any("waiting: another process is at" in text for text in told)


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_goes_on_ends_in_the_same_table_byte_for_byte(tmp_path: Path) -> None:
    tasks = ("tasks.names=[testbed_facts,testbed_programs]", "tasks.limit=8", "runtime.threads=1")
    options = ("model=tiny", "method=rtn", "fidelity=none", *tasks, "runtime.batch_size=2")
    sweep = ("experiment=table5_w8a8", *options)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_in_process(*sweep, results=whole).returncode == 0
    killed_when(
        [*RUN, *sweep, f"paths.results={broken}"],
        lambda: bool(list(broken.glob("unfinished/*/*/testbed_programs.jsonl"))),
    )
    assert not list(broken.glob("records/*-rtn-*.json"))
    assert run_in_process(*sweep, results=broken).returncode == 0
    limited = {"allow": ["dirty"], "where": {"tasks.limit": 8}}
    built = [build("table5_w8a8", results, results / "out", **limited) for results in (whole, broken)]
    for ours, theirs in zip(*built, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_damaged_records_and_calibrations_are_set_aside_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = spec(*LEARNED, f"paths.results={tmp_path}")
    first = execute(run)
    tensors = next(tmp_path.glob("artifacts/*/block_002.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    first.path.write_text(first.path.read_text()[:-40])
    capsys.readouterr()
    again = execute(run)
    said = capsys.readouterr().err
    assert f"warning: {first.path}: not readable as a record" in said
    assert f"warning: {tensors}: is not what was written" in said
    assert again.record is not None
    assert first.record is not None
    assert again.record.scores == first.record.scores
    assert len(list(tmp_path.glob("artifacts/*.damaged"))) == len(list(tmp_path.glob("records/*.json.damaged"))) == 1
    assert len(list(tmp_path.glob("records/*.items.damaged"))) == 1
    assert execute(run).reused


def test_a_clock_that_is_moved_back_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is found, compared or named by time."""
    run = spec("method=rtn", *QUICK, f"paths.results={tmp_path}")
    result = execute(run)
    edit_record(result.path, lambda data: data["provenance"].update(finished_at="2999-01-01T00:00:00+00:00"))
    for path in tmp_path.rglob("*"):
        os.utime(path, (4e9, 4e9))
    assert execute(run).reused
    assert not execute(spec("method=rtn", "bits=w8a8", *QUICK, f"paths.results={tmp_path}")).reused
    assert capsys.readouterr().err.count("running: ") == 3


@pytest.mark.parametrize("folder", ["/proc/results", "FILE/results"])
def test_a_results_folder_that_cannot_be_written_is_one_error_before_any_work(tmp_path: Path, folder: str) -> None:
    (tmp_path / "FILE").write_text("mine")
    results = folder if folder.startswith("/") else str(tmp_path / folder)
    done = run_in_process("-m", "method=rtn,awq", *QUICK, results=Path(results))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: paths.results: {results}: cannot be written: ")
    assert len(done.stderr.splitlines()) == 1
