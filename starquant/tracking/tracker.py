"""Trackers: nobody, or Weights & Biases in a process of its own, so that a dead service cannot stop a run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from starquant.config.run import RunSpec, TrackerSpec


class Tracker(Protocol):
    """Told of each record once it is on disk."""

    def publish(self, record: Path) -> None:
        """Start telling; returns at once."""
        ...

    def close(self) -> None:
        """Wait for what is still being told, within the tracker's own time limit."""
        ...


class NullTracker:
    """Tells nobody and imports nothing."""

    def publish(self, record: Path) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class WandbTracker:
    """Publish records through `starquant.tracking.wandb_worker`, one process each."""

    def __init__(self, spec: TrackerSpec, folder: Path) -> None:
        self._spec, self._folder = spec, folder
        self._workers: list[tuple[Path, subprocess.Popen[bytes]]] = []

    def publish(self, record: Path) -> None:
        """Start a worker for the record, unless W&B has it already."""
        content = json.loads(record.read_text(encoding="utf-8"))
        marker = marker_of(self._folder, content["digest"], self._spec.project, self._spec.mode, self._spec.entity)
        if marker.exists() and marker.read_text(encoding="utf-8") == content["provenance"]["finished_at"]:
            return
        command = [sys.executable, "-m", "starquant.tracking.wandb_worker", str(record), "--dir", str(self._folder)]
        command += ["--project", self._spec.project, "--mode", self._spec.mode]
        command += ["--entity", self._spec.entity] if self._spec.entity else []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "wandb_worker.log").open("ab") as log:
                worker = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            print(f"warning: W&B was not told ({error}); the run is safe in {record}", file=sys.stderr)
            return
        self._workers.append((record, worker))

    def close(self) -> None:
        """Wait at most `timeout_s` for all workers; those that are not done are ended and named."""
        deadline = time.monotonic() + self._spec.timeout_s
        for record, worker in self._workers:
            try:
                code = worker.wait(timeout=max(0.0, deadline - time.monotonic()))
                problem = f"failed with code {code}" if code else ""
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
                problem = f"did not answer within {self._spec.timeout_s:g} s"
            if problem:
                print(
                    f"warning: W&B {problem} (see {self._folder / 'wandb_worker.log'}); the run is safe in {record}",
                    file=sys.stderr,
                )
        self._workers = []


def marker_of(folder: Path, digest: str, project: str, mode: str, entity: str | None = None) -> Path:
    """Return the file that says when the record was finished that W&B has been told of."""
    return folder / "published" / "-".join(part for part in (entity, project, mode, digest) if part)


def make_tracker(spec: RunSpec) -> Tracker:
    """Return the tracker a run asks for."""
    if spec.tracker.name == "none":
        return NullTracker()
    return WandbTracker(spec.tracker, Path(spec.tracker.dir or Path(spec.paths.results) / "wandb").resolve())
