"""Where a number came from: code, packages, device, time."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from starquant.session.session import Code

PACKAGE = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "lm-eval",
    "datasets",
    "numpy",
    "hydra-core",
    "pydantic",
)


#: What a calibration can depend on, and what a score can: who is told, tables and command lines change neither.
FITTING = ("numerics", "config", "models", "diffusion", "calibration", "quantized", "kernels", "methods", "testbed")
SCORING = (*FITTING, "packed", "evaluation", "statistics", "runs", "session")


def code_digest(rooms: tuple[str, ...] = SCORING) -> str:
    """Return a digest of the Python sources of some rooms: results of the same digest came from the same code."""
    digest = hashlib.sha256()
    for room in sorted(rooms):
        root = PACKAGE / room
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def source() -> tuple[str | None, bool | None]:
    """Return the git SHA, and whether code or configuration differ from it or are not in it; None outside git."""
    sha = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--", str(PACKAGE), ":(top)conf", ":(top)run.py")
    return sha, None if status is None else bool(status)


def running_code() -> Code:
    """Return what code this is, as it lies on disk now; a session takes it once."""
    sha, dirty = source()
    return Code(sha, dirty, scoring=code_digest(SCORING), fitting=code_digest(FITTING))


def collect(device: str, device_name: str, code: Code | None = None) -> dict[str, Any]:
    """Return provenance as plain data; git fields are None outside a git checkout.

    Args:
        device: that was computed on.
        device_name: what it is called.
        code: that computed; None takes what lies on disk now.
    """
    code = code or running_code()
    return {
        "git_sha": code.git_sha,
        "git_dirty": code.git_dirty,
        "code_digest": code.scoring,
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "device_name": device_name,
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
