"""A run that executes code is refused where the sandbox is open, and its record says what held."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from starquant.errors import ConsentError
from starquant.evaluation.sandbox import protection as module
from starquant.evaluation.sandbox.protection import Protection
from starquant.evaluation.sandbox.walls import Walls
from starquant.runs.preflight import validate_paths
from starquant.runs.record import make_record
from starquant.session.session import Session
from starquant.store import provenance
from starquant.store.record import Timings
from tests.support.specs import spec

CONSENT = ("tasks=humaneval", "tasks.allow_code_execution=true")
WALLS = Walls("namespaces", False)
HELD = {name: True for name in ("network", "environment", "files", "processes", "leftovers")}


@pytest.mark.parametrize("hole", HELD)
def test_every_hole_needs_the_second_consent(hole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "protection", lambda: Protection(WALLS, **(HELD | {hole: False})))
    words = ("model=tiny", *CONSENT, f"paths.results={tmp_path}")
    with pytest.raises(ConsentError, match=rf"^tasks\.allow_weak_sandbox: humaneval .*: {hole} \("):
        validate_paths(spec(*words))
    validate_paths(spec(*words, "tasks.allow_weak_sandbox=true"))
    validate_paths(spec("model=tiny", "tasks=paper", f"paths.results={tmp_path}"))  # humaneval is left out


def test_no_hole_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "protection", lambda: Protection(WALLS, **HELD))
    validate_paths(spec("model=tiny", *CONSENT, f"paths.results={tmp_path}"))


def test_the_record_says_what_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "protection", lambda: Protection(WALLS, **(HELD | {"network": False})))
    session = Session.open()
    session.memory.code = provenance.running_code()
    session = dataclasses.replace(session, device="cpu")
    parts = {
        "scores": [],
        "manifest": [],
        "timings": Timings(seconds={}, peak_host_memory_gb=0.5, peak_device_memory_gb=None),
    }
    record = make_record(spec("model=tiny", *CONSENT), session, **parts)
    assert record.provenance["sandbox"] == {"walls": "namespaces"} | HELD | {"network": False}
    assert "sandbox" not in make_record(spec("model=tiny"), session, **parts).provenance
