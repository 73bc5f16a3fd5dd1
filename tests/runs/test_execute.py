"""One run to its record: contents, reuse, interruption, trackers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from starquant.reports.run_table import render
from starquant.runs.execute import Result, execute
from starquant.store.record import RunRecord
from tests.support.command_line import ENVIRONMENT, RUN
from tests.support.specs import spec

QUICK = ("tasks.names=[testbed_facts,testbed_programs]", "tasks.limit=16")


def quick(results: Path, *overrides: str) -> Result:
    return execute(spec(*QUICK, f"paths.results={results}", *overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return quick(tmp_path_factory.mktemp("results"))


def assert_same_scores(found: RunRecord, expected: RunRecord) -> None:
    """Tasks to the last digit; fidelity, which is not of whole answers, up to rounding."""
    for a, b in zip(found.scores, expected.scores, strict=True):
        assert (a.task, a.metric, a.filter) == (b.task, b.metric, b.filter)
        assert a.value == (pytest.approx(b.value, rel=1e-4, abs=1e-7) if a.task == "fidelity" else b.value)


def test_record_holds_what_a_table_needs(finished: Result) -> None:
    record = json.loads(finished.path.read_text())
    assert record["status"] == "complete"
    assert record["digest"] in finished.path.name
    assert record["spec"]["bits"]["name"] == "w4a4"
    scores = {(s["task"], s["metric"], s["filter"]): s for s in record["scores"]}
    facts = scores["testbed_facts", "acc", "none"]
    assert (facts["n"], facts["num_fewshot"], facts["task_version"]) == (16, 0, "1.0")
    assert facts["higher_is_better"] is True
    assert facts["stderr"] is not None
    assert ("testbed_programs", "solved", "none") in scores
    linears = [e for e in record["manifest"] if e["kind"] == "linear"]
    assert len(linears) == 28
    assert all(e["weight_bits"] == e["activation_bits"] == 4 for e in linears)
    assert all(e["weight_sqnr_db"] > 10 and e["activation_sqnr_db"] > 5 for e in linears)
    assert record["timings"]["peak_host_memory_gb"] > 0.1
    assert {"load", "quantize", "evaluate"} <= set(record["timings"]["seconds"])
    assert {"git_sha", "git_dirty", "code_digest", "packages", "device"} <= set(record["provenance"])


def test_items_lie_beside_the_record(finished: Result) -> None:
    folder = finished.path.with_suffix(".items")
    rows = [json.loads(line) for line in (folder / "testbed_facts.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    values = [row["acc"] for row in rows]
    assert sum(values) / 16 == pytest.approx(finished.record.scores[0].value)


def test_baseline_is_a_record_of_its_own(finished: Result) -> None:
    assert finished.baseline.spec["method"]["name"] == "none"
    assert {e.weight_bits for e in finished.baseline.manifest if e.kind == "linear"} == {16}
    assert len(list(finished.path.parent.glob("*.json"))) == 2
    assert not list((finished.path.parent.parent / "unfinished").glob("*"))


def test_report_shows_full_precision_quantized_and_difference(finished: Result) -> None:
    text = render(finished.record, finished.baseline, finished.path)
    row = next(line for line in text.splitlines() if line.startswith("testbed_programs"))
    scored = [next(s for s in r.scores if s.task == "testbed_programs") for r in (finished.baseline, finished.record)]
    before, after = (score.value for score in scored)
    numbers = [f"{100 * before:.2f}", f"{100 * after:.2f}", f"{100 * (after - before):+.2f}"]
    assert row.split()[:6] == ["testbed_programs", "solved", "16", *numbers]


def test_report_tells_widths_apart_that_share_a_preset(finished: Result) -> None:
    record = finished.record.model_copy(deep=True)
    record.spec["bits"]["attention"]["v"] = 4
    record.spec["bits"]["weights"]["group_size"] = 32
    assert "w4a4 [group=32, v=4]" in render(record, finished.baseline, finished.path)
    assert "tiny  w4a4  rtn" in render(finished.record, finished.baseline, finished.path)


def test_a_record_is_reused_until_the_code_changes(finished: Result, monkeypatch, capsys) -> None:
    results = finished.path.parent.parent
    written = finished.path.stat().st_mtime_ns
    again = quick(results, "runtime.batch_size=5")
    assert again.record == finished.record
    assert finished.path.stat().st_mtime_ns == written
    monkeypatch.setattr("starquant.store.provenance.CodeDigest.of", lambda *_: "other")
    assert quick(results, "reuse=any").record == finished.record
    assert finished.path.stat().st_mtime_ns == written
    quick(results)
    assert finished.path.stat().st_mtime_ns > written
    assert "is of other code" in capsys.readouterr().err


def test_scores_do_not_depend_on_the_batch_size(finished: Result, tmp_path: Path) -> None:
    small = quick(tmp_path, "runtime.batch_size=3")
    assert_same_scores(small.record, finished.record)
    assert_same_scores(small.baseline, finished.baseline)


def test_killed_and_started_again(finished: Result, tmp_path: Path) -> None:
    """SIGKILL while answering; the second run repeats no answered request and ends with the same scores."""
    arguments = [*QUICK, "method=rtn", f"paths.results={tmp_path}", "runtime.batch_size=1", "runtime.threads=1"]
    command = [*RUN, *arguments]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        logs = list(tmp_path.glob("unfinished/*/*/*.jsonl"))
        if logs and sum(len(log.read_text().splitlines()) for log in logs) >= 4:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    answered = {log.name: log.read_text().splitlines() for log in tmp_path.glob("unfinished/*/*/*.jsonl")}
    assert answered
    assert not list(tmp_path.glob("records/tiny-w4a4-*.json"))
    result = quick(tmp_path, "runtime.batch_size=1")
    assert_same_scores(result.record, finished.record)


def test_wandb_offline_run_is_written_with_the_digest_as_id(finished: Result, tmp_path: Path) -> None:
    result = quick(tmp_path, "tracker=wandb")
    result.tracker.close()
    runs = list(tmp_path.glob("wandb/wandb/offline-run-*"))
    assert {run.name.rsplit("-", 1)[1] for run in runs} == {result.record.digest, result.baseline.digest}
    assert all(list(run.glob("*.wandb")) for run in runs)


def test_a_dead_tracker_is_named_and_stops_nothing(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    result = quick(tmp_path, "tracker=wandb", "tracker.mode=online", "tracker.timeout_s=1.5")
    began = time.monotonic()
    result.tracker.close()
    assert time.monotonic() - began < 4.0
    assert result.path.exists()
    message = capsys.readouterr().err
    assert "W&B" in message
    assert str(result.path) in message


@pytest.mark.slow  # imports everything anew; test_wandb_offline publishes without a tracker in a process of its own
def test_without_a_tracker_wandb_is_not_imported() -> None:
    code = "import starquant.runs.execute, sys; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
