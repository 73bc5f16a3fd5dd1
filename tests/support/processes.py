"""Processes that hold something until they are told to end."""

from __future__ import annotations

import subprocess
import sys

from tests.support.paths import REPOSITORY


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that says "held" and then waits for a line."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, cwd=REPOSITORY, **pipes)


def end(process: subprocess.Popen[str], line: str = "\n") -> None:
    process.communicate(line, timeout=30)
