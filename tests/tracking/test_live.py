"""Weights & Biases while a run is computed: stage, losses, SQNR, counts; one W&B run from its begin to its record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from starquant.config.execution import TrackerSpec
from starquant.runs.live import sqnr_by_block
from starquant.store.manifest import ManifestEntry
from starquant.store.records import RecordStore
from starquant.tracking import live
from starquant.tracking.live import LiveFile, follow
from starquant.tracking.tracker import WandbTracker, marker_of
from tests.support.records import items_of, make_record, write_record
from tests.support.specs import spec
from tests.support.wandb_files import offline_runs

TRACKER = TrackerSpec(name="wandb", project="quant", timeout_s=120.0)
FACTS = {"testbed_facts": items_of([1.0, 0.0])}


def test_a_run_is_shown_from_its_begin_to_its_record(tmp_path: Path) -> None:
    folder, run = tmp_path / "wandb", spec("method=rtn")
    full = run.baseline()
    RecordStore(tmp_path).write(full, make_record(full, 0.75))
    tracker = WandbTracker(TRACKER, folder)
    tracker.begin(run)
    tracker.log({"stage": "calibrate"})
    tracker.log({"block": 0.5, "loss/qkv_input": 2.0})
    tracker.log({"block": 0.0, "sqnr_db/weights": 17.0})
    tracker.log({"requests/testbed_facts": 1})
    tracker.log({"requests/testbed_facts": 2})
    tracker.publish(write_record(tmp_path, FACTS, "method=rtn"))
    tracker.close()
    (shown,) = offline_runs(folder)[run.digest()]
    assert shown.ended
    assert shown.metrics == {"loss/*": "block", "sqnr_db/*": "block"}
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in shown.history]
    assert rows[:3] == [
        {"block": 0.5, "loss/qkv_input": 2.0},
        {"block": 0.0, "sqnr_db/weights": 17.0},
        {"requests/testbed_facts": 2},
    ]
    assert shown.summary["stage"] == "finished"
    assert shown.summary["score/testbed_facts/acc,none"] == 0.5
    assert shown.summary["difference/testbed_facts/acc,none"] == -0.25
    assert marker_of(folder, run.digest(), "quant", "offline").exists()
    assert not list((folder / "live").iterdir())


def test_counts_are_told_now_and_then_and_the_last_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    file = LiveFile(tmp_path / "live" / "a.jsonl", "a", {})
    for count in range(1, 8):
        now[0] += 0.9
        file.log({"requests/gsm8k": count})
    file.log({"stage": "fidelity"})
    file.end(error="x")
    figures = [line["figures"] for line in follow(file.path, os.getppid()) if "figures" in line]
    assert figures == [{"requests/gsm8k": 3}, {"requests/gsm8k": 6}, {"requests/gsm8k": 7, "stage": "fidelity"}]


def test_a_run_whose_process_is_gone_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = [7, 1, 1]
    monkeypatch.setattr(os, "getppid", lambda: parents.pop(0))
    monkeypatch.setattr(live, "POLL_S", 0.0)
    file = LiveFile(tmp_path / "a.jsonl", "a", {})
    lines = follow(file.path, 7)
    assert next(lines) == {"digest": "a", "spec": {}}
    with file.path.open("a") as stream:
        stream.write(json.dumps({"figures": {"block": 1}}) + '\n{"fig')  # killed while it wrote
    assert [*lines] == [{"figures": {"block": 1}}, {"record": None, "error": "the process of the run has died"}]


def test_a_run_that_died_while_its_worker_was_started_has_failed(tmp_path: Path) -> None:
    """The worker's imports take seconds: by then it may be another process's child."""
    file = LiveFile(tmp_path / "a.jsonl", "a", {})
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert [*follow(file.path, gone.pid)][1:] == [{"record": None, "error": "the process of the run has died"}]


def test_sqnr_by_block_is_the_mean_of_what_was_measured() -> None:
    def linear(block: int, role: str, site: str, weight: float | None, activation: float | None) -> ManifestEntry:
        sqnr = {"weight_sqnr_db": weight, "activation_sqnr_db": activation}
        return ManifestEntry(name=f"{block}.{role}", kind="linear", role=role, block=block, site=site, **sqnr)

    manifest = [
        ManifestEntry(name="head", kind="head", role="head", weight_sqnr_db=99.0),
        linear(1, "q", "b1.qkv", 10.0, 20.0),
        linear(1, "k", "b1.qkv", 12.0, 20.0),  # the same site: counted once
        linear(1, "down", "b1.down", 17.0, 8.0),
        linear(0, "q", "b0.qkv", None, None),
        ManifestEntry(name="b1.v", kind="operand", role="v", block=1, activation_sqnr_db=30.0),
    ]
    expected = {"block": 1, "sqnr_db/weights": fmean([10, 12, 17]), "sqnr_db/activations": 14.0}
    assert [*sqnr_by_block(manifest)] == [expected | {"sqnr_db/attention": 30.0}]
