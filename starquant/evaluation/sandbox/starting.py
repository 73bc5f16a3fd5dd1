"""Start one side of the sandbox, and end it with all that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from starquant.evaluation.sandbox.walls import PATH, Walls

_HERE = Path(__file__).parent
#: `inside.py`, which finds what it imports there: none of them need lie where the program can see it.
CODE = """import sys, types
for name, text in {imported!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(text, module.__dict__)
exec({inside!r})
""".format(
    imported={
        f"{__package__}.{name}": (_HERE / f"{name}.py").read_text(encoding="utf-8") for name in ("values", "calls")
    },
    inside=(_HERE / "inside.py").read_text(encoding="utf-8"),
)
#: One thread each: on many cores a library's threads alone would exceed the limit on processes.
ENVIRONMENT = {"PATH": PATH, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Limits:
    """Bounds on one program.

    Attributes:
        seconds: wall-clock and CPU time.
        memory_mb: address space of a process.
        file_mb: size of any file it writes.
        open_files: file descriptors.
        processes: processes and threads.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 1
    open_files: int = 32
    processes: int = 8


@contextlib.contextmanager
def started(
    role: str, link: socket.socket, walls: Walls, limits: Limits, folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Start one side of the sandbox in an empty folder; in the end, kill it with all that it has started.

    Args:
        role: "program" or "tests".
        link: its end of the line to the other side.
        walls: to keep it in.
        limits: on it.
        folder: to make.
    """
    folder.mkdir()
    if walls.changes_user and walls.name != "namespaces":
        folder.chmod(0o777)
    numbers = (int(limits.seconds) + 1, limits.memory_mb, limits.file_mb, limits.open_files)
    words = [sys.executable, "-I", "-B", "-c", CODE, role, str(link.fileno()), *map(str, numbers)]
    process = subprocess.Popen(
        walls.command([*words, str(walls.processes(limits.processes))], folder, limits.file_mb, limits.seconds + 5),
        cwd="/" if walls.name == "namespaces" else folder,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE if role == "tests" else subprocess.DEVNULL,
        stdout=subprocess.PIPE if role == "tests" else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[link.fileno()],
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        process.wait()
