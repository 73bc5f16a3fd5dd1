"""Run a model-written program against its tests, each in a process of its own behind walls; the tests' one judges."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from starquant.evaluation.sandbox.protection import protection
from starquant.evaluation.sandbox.starting import Limits, started
from starquant.evaluation.sandbox.walls import Walls


@dataclass(frozen=True)
class Outcome:
    """Whether the program passed its tests, and if not, why ("timed out", or its error in one line)."""

    passed: bool
    reason: str


def run_program(
    program: str, tests: str, limits: Limits | None = None, *, prompt: str = "", walls: Walls | None = None
) -> Outcome:
    """Run a program in one process and its tests in another; only plain values pass between them.

    Args:
        program: Python source, with the prompt that it completes in front.
        tests: Python source that uses the program's functions; the program passes if this reaches its end.
        limits: on each of the two.
        prompt: what the program begins with; the tests see what it defines as it stands there, whatever the program
            makes of it, all but its last function.
        walls: to keep both in; None for the strongest that hold here.
    """
    limits = limits or Limits()
    walls = walls or protection().walls
    with contextlib.ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="starquant-sandbox-")))
        ours, theirs = (ending.enter_context(end) for end in socket.socketpair())
        ending.enter_context(started("program", theirs, walls, limits, folder / "program"))
        judge = ending.enter_context(started("tests", ours, walls, limits, folder / "tests"))
        theirs.close()  # the tests hear that the program has gone only if nobody else holds its end
        ours.close()
        job = json.dumps({"program": program, "prompt": prompt, "tests": tests})
        try:
            said, _ = judge.communicate(job.encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
    return _outcome(said)


def _outcome(said: bytes) -> Outcome:
    try:
        verdict = json.loads(said)
    except ValueError:  # its tests ended early, or could not be run
        return Outcome(False, "its tests did not end")
    return Outcome(verdict["passed"] is True, verdict["reason"])
