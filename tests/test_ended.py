"""Commands that are ended from outside: Ctrl-C, and a reader of their output that has enough."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from starquant.errors import ended, one_line_errors
from tests.support.command_line import ENVIRONMENT, RUN
from tests.support.paths import REPOSITORY

#: Ctrl-C while a module is imported.
INTERRUPTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs tests in the background
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
"""
COMMAND = (sys.executable, "-m", "starquant")


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ((*RUN, "model=tiny"), "starquant.__main__"),
        ((*RUN, "model=tiny"), "starquant.errors"),
        ((*RUN, "model=tiny"), "starquant.sweeps.command_line"),
        ((*COMMAND, "generate", "tiny", "a"), "tempfile"),
        ((*COMMAND, "generate", "tiny", "a"), "torch"),
        ((*COMMAND, "report", "--out", "x.html"), "starquant.reports.page.content"),
    ],
)
def test_ctrl_c_while_a_command_starts_is_no_traceback(command: tuple[str, ...], module: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS.format(module=module))
    path = os.pathsep.join((str(tmp_path), str(REPOSITORY)))
    done = subprocess.run(
        command, env=ENVIRONMENT | {"PYTHONPATH": path}, cwd=REPOSITORY, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["methods", "models", "report --help", "--help"])
def test_a_reader_that_has_enough_ends_a_command(words: str) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    try:
        settings = {"env": ENVIRONMENT | {"PYTHONUNBUFFERED": ""}, "cwd": REPOSITORY, "text": True}
        done = subprocess.run([*COMMAND, *words.split()], stdout=writes, stderr=subprocess.PIPE, **settings)
    finally:
        os.close(writes)
    assert done.returncode == 141
    assert done.stderr == ""


def test_another_pipe_that_breaks_is_a_bug() -> None:
    def broken() -> int:
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError, match="a worker's"):
        ended(one_line_errors(OSError)(broken))
