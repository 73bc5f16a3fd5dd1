"""What a system offers to keep a program in: namespaces of Linux, another user, or nothing but limits.

Namespaces are made by util-linux (`unshare`, `mount`, `pivot_root`, `setpriv`): the program then sees a file system of
its own with Python in it, read-only, and one writable folder in memory; no other process; no network.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Where user ids lie that nobody has: a program's own id counts its processes, and owns no file.
FREE_IDS = (0x70000000, 0x7F000000)
_DROPPED = ("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--")

#: $1 an empty folder, $2 bytes it may write, $3 how many paths to show follow, the paths, the command. Runs as the
#: first process of its namespace, which dies with it. The last line is not `exec`: a change of user would undo that.
_SCRIPT = """
set -e
root=$1 bytes=$2 count=$3
shift 3
mount -t tmpfs -o size=1m,nr_inodes=4k,mode=755 tmpfs "$root"
while [ "$count" -gt 0 ]; do
  path=$1 count=$((count - 1))
  shift
  if [ -L "$path" ] && [ -z "${path%/*}" ]; then
    ln -s "$(readlink "$path")" "$root$path"
  elif [ -d "$path" ]; then
    mkdir -p "$root$path"
    mount --rbind "$path" "$root$path"
    mount -o remount,bind,ro,nosuid,nodev "$root$path"
  fi
done
mkdir "$root/dev" "$root/proc" "$root/own"
for device in null zero random urandom; do
  : > "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t proc -o nosuid,nodev,noexec proc "$root/proc" 2> /dev/null || true
mount -t tmpfs -o "size=$bytes,nr_inodes=1k,mode=777,nosuid,nodev" tmpfs "$root/own"
mount -o remount,bind,ro "$root"
cd "$root"
pivot_root . .
umount -l .
cd /own
"$@"
exit $?
"""


@dataclass(frozen=True)
class Walls:
    """One way to start a program.

    Attributes:
        name: for records: "namespaces", "another user" or "none".
        changes_user: whether it runs under an id that nobody has; needs root.
    """

    name: str
    changes_user: bool

    def command(self, words: list[str], folder: Path, file_mb: int, seconds: float) -> list[str]:
        """Return the command line that runs `words`.

        Args:
            words: a Python interpreter and its arguments.
            folder: an empty one; with namespaces all that the program sees is mounted there.
            file_mb: a file's limit; all files together have sixteen times that.
            seconds: after which namespaces end although the caller, killed itself, has not ended them.
        """
        user: list[str] = []
        if self.changes_user:
            free = str(random.SystemRandom().randrange(*FREE_IDS))
            user = [f"--reuid={free}", f"--regid={free}", "--clear-groups"]
        if self.name == "none":
            return words
        inner = ["setpriv", *user, *_DROPPED, *words]
        if self.name == "another user":
            return inner
        spaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
        if not self.changes_user:
            spaces += ["--user", "--map-root-user"]
        paths = _shown()
        script = ["sh", "-c", _SCRIPT, "sh", str(folder), str(file_mb << 24), str(len(paths)), *paths]
        return ["timeout", "--signal=KILL", str(seconds), "unshare", *spaces, "--", *script, *inner]

    def processes(self, allowed: int) -> int:
        """Return the limit on processes and threads that leaves `allowed` to the program."""
        if self.name == "namespaces" or self.changes_user:
            return allowed
        return allowed + sum(_threads(folder) for folder in Path("/proc").glob("[0-9]*"))


def walls_here() -> list[Walls]:
    """Return what may be tried here, the strongest first."""
    if not sys.platform.startswith("linux"):
        return [Walls("none", False)]
    root = os.geteuid() == 0
    return [Walls("namespaces", root), *([Walls("another user", True)] if root else []), Walls("none", False)]


def _shown() -> list[str]:
    """Return the folders that a program sees: the system's, and Python's where they lie elsewhere."""
    interpreter = Path(sys.executable)
    python = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, str(interpreter.resolve().parents[1])]
    shown = [path for path in SYSTEM if os.path.lexists(path)]
    for path in python:
        if path not in shown and not path.startswith("/usr/") and Path(path) != Path("/"):
            shown.append(path)
    return shown


def _threads(process: Path) -> int:
    """Return how many threads a process of this user has; of others, none."""
    try:
        return len(list((process / "task").iterdir())) if process.stat().st_uid == os.getuid() else 0
    except OSError:
        return 0
