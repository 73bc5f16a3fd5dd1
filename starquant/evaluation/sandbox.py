"""Run a model-written program in a separate process with limits on time, memory and files.

This contains accidents, not attackers: the program may still read files, open sockets, and leave its process group
to live on. Run untrusted checkpoints inside a container.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_RUNNER = Path(__file__).with_name("sandbox_runner.py")


@dataclass(frozen=True)
class Limits:
    """Bounds on one program.

    Attributes:
        seconds: wall-clock and CPU time.
        memory_mb: address space.
        file_mb: size of any file it writes.
        open_files: file descriptors.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 1
    open_files: int = 32


@dataclass(frozen=True)
class Outcome:
    """Whether the program ran to its end, and if not, why ("timed out", or the last line of its error)."""

    passed: bool
    reason: str


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run Python source in a process of its own, in an empty temporary folder with an empty environment.

    A program passes only if it reaches its last line: leaving early with `exit()` does not count.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="starquant-sandbox-") as folder:
        program, finished, errors, own = (Path(folder) / n for n in ("program.py", "finished", "errors", "own"))
        own.mkdir()
        program.write_text(source, encoding="utf-8", errors="replace")
        numbers = (int(limits.seconds) + 1, limits.memory_mb, limits.file_mb, limits.open_files)
        with errors.open("wb") as stream:  # a file, unlike a pipe, is bounded by the limit on file size
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(_RUNNER), str(program), str(finished), *map(str, numbers)],
                cwd=own,
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stream,
                start_new_session=True,
            )
        try:
            process.communicate(token.encode() + b"\n", timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
        finally:
            _kill_group(process)
        if process.returncode == 0 and finished.is_file() and finished.read_text(errors="replace") == token:
            return Outcome(True, "passed")
        lines = errors.read_text(errors="replace")[-2000:].split("\n") if errors.is_file() else []
    said = next((line for line in reversed(lines) if line.strip()), "")
    return Outcome(False, said[:200] or f"ended early with code {process.returncode}")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    process.wait()
