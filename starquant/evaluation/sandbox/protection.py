"""Which walls hold here: measured by a program that tries to get over them, once a process."""

from __future__ import annotations

import contextlib
import functools
import secrets
import socket
import struct
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from starquant.evaluation.sandbox.inside import Link
from starquant.evaluation.sandbox.starting import Limits, started
from starquant.evaluation.sandbox.values import Ended, decode, encode
from starquant.evaluation.sandbox.walls import PATH, Walls, walls_here

_LIMITS = Limits(seconds=8.0)
#: Returns what it could do; leaves processes behind that hold the line open.
_ATTEMPT = """
def attempt(port, planted, folder, secret):
    import glob, os, socket, time
    def does(action, *arguments):
        try:
            return action(*arguments) is not False
        except OSError:
            return False
    def read(path, text):
        with open(path, "rb") as stream:
            return text in stream.read()
    def write(path):
        with open(path, "w") as stream:
            stream.write("x")
    started = 0
    for _ in range(64):
        try:
            if os.fork() == 0:
                os.setsid()
                time.sleep(10)
                os._exit(0)
        except OSError:
            break
        started += 1
    return {
        "network": does(lambda: socket.create_connection(("127.0.0.1", port), 2).close())
        or hasattr(socket, "AF_VSOCK") and does(lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()),
        "environment": any([does(read, path, secret) for path in glob.glob("/proc/[0-9]*/environ")]),
        "files": does(read, planted, b"planted") or does(write, os.path.join(folder, "written")),
        "processes": started,
    }
"""


@dataclass(frozen=True)
class Protection:
    """What a program is kept from; each is measured, not concluded.

    Attributes:
        walls: how it is started.
        network: from connecting to what listens on this machine, or on the host of a virtual one.
        environment: from reading that of any other process.
        files: from reading and writing outside its folder, but for the system's and Python's own.
        processes: from starting more than a few.
        leftovers: from leaving one behind.
    """

    walls: Walls
    network: bool
    environment: bool
    files: bool
    processes: bool
    leftovers: bool

    def missing(self) -> list[str]:
        """Return what a program is not kept from."""
        return [name for name, held in asdict(self).items() if held is False]

    def as_data(self) -> dict[str, Any]:
        """Return it for a record."""
        return asdict(self) | {"walls": self.walls.name}


@functools.cache
def protection() -> Protection:
    """Return the strongest protection that this system gives."""
    measured: list[Protection] = []
    for walls in walls_here():
        one = measure(walls)
        if one is not None:
            measured.append(one)
            if not one.missing():
                break
    if not measured:
        return Protection(Walls("none", False), False, False, False, False, False)
    return min(measured, key=lambda one: len(one.missing()))


def measure(walls: Walls) -> Protection | None:
    """Return what walls keep a program from; None where it cannot even be started behind them."""
    with contextlib.ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="starquant-sandbox-")))
        server = ending.enter_context(socket.create_server(("127.0.0.1", 0)))
        ours, theirs = (ending.enter_context(end) for end in socket.socketpair())
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(_LIMITS.seconds), 0))
        for path in (folder, folder / "open"):  # open to everyone: only walls can keep a program out
            path.mkdir(exist_ok=True)
            path.chmod(0o777)
        (folder / "planted").write_text("planted", encoding="utf-8")
        secret = secrets.token_hex(16)
        other = subprocess.Popen(["sleep", "60"], env={"PATH": PATH, "SECRET": secret})
        ending.callback(other.wait)
        ending.callback(other.kill)
        try:
            with started("program", theirs, walls, _LIMITS, folder / "own"):
                theirs.close()
                could = _attempt(
                    Link(ours.fileno()),
                    server.getsockname()[1],
                    str(folder / "planted"),
                    str(folder / "open"),
                    secret.encode(),
                )
        except (Ended, OSError, KeyError, TypeError):
            return None
        few = could["processes"] <= _LIMITS.processes
        return Protection(
            walls, not could["network"], not could["environment"], not could["files"], few, _is_closed(ours)
        )


def _attempt(link: Link, *arguments: Any) -> dict[str, Any]:
    link.send(_ATTEMPT)
    link.receive()
    link.send(["attempt", [encode(arguments), encode({})]])
    could: dict[str, Any] = decode(link.receive()["value"])
    return could


def _is_closed(line: socket.socket) -> bool:
    """Whether every process that held the other end is gone; what is killed takes a moment to go."""
    line.settimeout(3)
    try:
        return line.recv(1) == b""
    except OSError as error:
        return isinstance(error, ConnectionError)
