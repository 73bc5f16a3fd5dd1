"""The command line, in a process of its own and in this one."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from tests.support.paths import REPOSITORY

RUN = (sys.executable, str(REPOSITORY / "run.py"))
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
ENVIRONMENT = {**os.environ, **QUIET}


def process(*command: str, seconds: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in the root of the repository; `more` are environment variables."""
    settings = {"env": ENVIRONMENT | more, "cwd": REPOSITORY, "timeout": seconds}
    return subprocess.run(command, capture_output=True, text=True, **settings)


def run(*arguments: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return process(*RUN, *arguments, seconds=seconds)


def run_in_process(*arguments: str, results: Path) -> subprocess.CompletedProcess[str]:
    """Run the same here, as if nothing had run in this process before; `results` is where it writes."""
    from starquant.sweeps.command_line import main

    words = [*arguments, f"paths.results={results}"]
    out, err = io.StringIO(), io.StringIO()
    with _left_as_it_was(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Keep environment, folder, signal handler, logging, threads and Hydra's state."""
    import torch
    from hydra.core.global_hydra import GlobalHydra

    root, folder, threads = logging.getLogger(), os.getcwd(), torch.get_num_threads()
    handlers, level, handler = list(root.handlers), root.level, signal.getsignal(signal.SIGTERM)
    with mock.patch.dict(os.environ, QUIET):
        os.chdir(REPOSITORY)
        try:
            yield
        finally:
            os.chdir(folder)
            signal.signal(signal.SIGTERM, handler)
            root.handlers[:], root.level = handlers, level
            torch.set_num_threads(threads)
            GlobalHydra.instance().clear()
