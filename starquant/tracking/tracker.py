"""Weights & Biases in a process of its own, so that a dead service cannot stop a run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from starquant.config.execution import TrackerSpec
from starquant.config.run import RunSpec
from starquant.session.tracker import NullTracker, Tracker
from starquant.store.files import write_atomically
from starquant.tracking.live import LiveFile

log = logging.getLogger(__name__)


class WandbTracker:
    """Show runs while they are computed, records and failures through `starquant.tracking.wandb_worker`.

    A run that is computed has one process, from its begin to its record or failure; else it is one a record.
    """

    def __init__(self, spec: TrackerSpec, folder: Path) -> None:
        self._spec, self._folder = spec, folder
        self._workers: dict[Path, tuple[str, subprocess.Popen[bytes]]] = {}
        self._live: LiveFile | None = None

    def begin(self, spec: RunSpec) -> None:
        """Start a worker that follows the run."""
        digest = spec.digest()
        try:
            self._live = LiveFile(self._folder / "live" / f"{digest}.jsonl", digest, spec.model_dump(mode="json"))
        except OSError as problem:
            log.warning("W&B is not told of the run while it is computed (%s)", problem)
            return
        self._start(self._live.path, "the run does not depend on it", "--live", str(os.getpid()))

    def log(self, figures: Mapping[str, float | str]) -> None:
        """Show figures of the run that was begun."""
        if self._live is None:
            return
        try:
            self._live.log(figures)
        except OSError as problem:
            log.warning("W&B is no longer told of the run while it is computed (%s)", problem)
            self._live = None

    def _end_live(self, digest: str | None, record: Path | None = None, error: str | None = None) -> bool:
        """End the run that was begun; returns whether it is that of the digest."""
        live, self._live = self._live, None
        if live is None:
            return False
        try:
            live.end(record, error)
        except OSError as problem:
            log.warning("W&B was not told how the run ended (%s)", problem)
        return live.digest == digest

    def publish(self, record: Path) -> None:
        """Start a worker for the record, unless W&B has it already."""
        content = json.loads(record.read_text(encoding="utf-8"))
        if self._live is not None and self._live.digest == content["digest"]:
            if (started := self._workers.get(self._live.path)) is not None:
                self._workers[self._live.path] = (_safe(record), started[1])
            self._end_live(content["digest"], record)
            return
        marker = marker_of(self._folder, content["digest"], self._spec.project, self._spec.mode, self._spec.entity)
        if marker.exists() and marker.read_text(encoding="utf-8") == content["provenance"]["finished_at"]:
            return
        self._start(record, _safe(record))

    def failed(self, spec: RunSpec, error: BaseException) -> None:
        """Start a worker for a run that has no record: its configuration and the error in one line."""
        digest, line = spec.digest(), " ".join(f"{type(error).__name__}: {error}".split())
        if self._end_live(digest, error=line):  # where it is its full-precision twin's, both have failed
            return
        path = self._folder / "failed" / f"{digest}.json"
        content = {"digest": digest, "spec": spec.model_dump(mode="json"), "error": line}
        try:
            write_atomically(path, json.dumps(content, indent=1) + "\n")
        except OSError as problem:
            log.warning("W&B was not told (%s); the run has failed", problem)
            return
        self._start(path, "the run has failed", "--failed")

    def _start(self, path: Path, outcome: str, *options: str) -> None:
        command = [sys.executable, "-m", "starquant.tracking.wandb_worker", str(path), "--dir", str(self._folder)]
        command += ["--project", self._spec.project, "--mode", self._spec.mode, *options]
        command += ["--entity", self._spec.entity] if self._spec.entity else []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "wandb_worker.log").open("ab") as output:
                worker = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
        except OSError as error:
            log.warning("W&B was not told (%s); %s", error, outcome)
            return
        self._workers[path] = (outcome, worker)

    def close(self) -> None:
        """Wait at most `timeout_s` for all workers; those that are not done are ended and named."""
        deadline = time.monotonic() + self._spec.timeout_s
        for outcome, worker in self._workers.values():
            try:
                code = worker.wait(timeout=max(0.0, deadline - time.monotonic()))
                problem = f"failed with code {code}" if code else ""
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
                problem = f"did not answer within {self._spec.timeout_s:g} s"
            if problem:
                log.warning("W&B %s (see %s); %s", problem, self._folder / "wandb_worker.log", outcome)
        self._workers = {}


def _safe(record: Path) -> str:
    return f"the run is safe in {record}"


def marker_of(folder: Path, digest: str, project: str, mode: str, entity: str | None = None) -> Path:
    """Return the file that says when the record was finished that W&B has been told of."""
    return folder / "published" / "-".join(part for part in (entity, project, mode, digest) if part)


def make_tracker(spec: RunSpec) -> Tracker:
    """Return the tracker that a run names."""
    if spec.tracker.name == "none":
        return NullTracker()
    return WandbTracker(spec.tracker, Path(spec.tracker.dir or Path(spec.paths.results) / "wandb").resolve())
