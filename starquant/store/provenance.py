"""Where a number came from: code, packages, device, time."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from starquant.session.session import Code

PACKAGE = Path(__file__).resolve().parent.parent
#: Of a wheel: the commit that it was built of (setup.py).
COMMIT = PACKAGE / "commit.json"
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

#: Rooms that a calibration can depend on, and those that a score can.
FITTING = (
    *("calibration", "config", "diffusion", "kernels", "methods", "models", "numerics", "quantized", "registry.py"),
    *("runs", "testbed"),
)
SCORING = (*FITTING, "evaluation", "llama_cpp", "packed", "session", "statistics")
#: Rooms that can change no score, and why.
INERT = {
    "commands.py": "names of commands",
    "errors.py": "the wording of errors",
    "forecast": "tells what runs would take; none is scored by it",
    "resources.py": "where folders lie that are digested as data or change no score",
    "reports": "reads records of finished runs",
    "store": "keeps what was computed; what is read back is what was written",
    "sweeps": "composes specifications, which are digested as data",
    "tracking": "sends finished records elsewhere",
}
#: Data files that decide scores: tasks and their items. `kernels/tiles.json` decides speed, weights of the testbed are
#: fingerprinted.
DATA = ("*.yaml", "*.jsonl", "*.csv", "*.tsv", "*.txt", "*.parquet")
#: What scores: of lm-eval, its version, all code outside `tasks/`, and these folders below it; other tasks of lm-eval
#: count by its version.
HARNESS, HARNESS_ROOM = "lm_eval", "evaluation"
STOCK_TASKS = ("arc", "ceval", "gsm8k", "hellaswag", "humaneval", "mmlu/default", "piqa", "truthfulqa", "winogrande")


class CodeDigest:
    """Digests of the package's code, each file as it was when it was first read.

    What counts is the syntax tree without docstrings, the nodes of YAML files, the bytes of other data: comments,
    docstrings and formatting change nothing. Python 3.10 to 3.13 agree on this package; a version that parses a file
    into another tree (3.12.1 does with f"{x:{width}}") gives another digest, and what was computed under the other is
    then computed again.

    Of lm-eval, which scores, version and bytes count; a release of it is taken as code like our own.

    Args:
        package: folder whose subfolders and files are the rooms.
        harness: folder of lm-eval; None for the one that is installed.
    """

    def __init__(self, package: Path = PACKAGE, harness: Path | None = None) -> None:
        self._package = package
        self._harness = harness or _installed(HARNESS)
        self._files: dict[Path, bytes] = {}

    def of(self, rooms: Sequence[str] = SCORING) -> str:
        """Return sixteen hexadecimal digits: results of the same digest came from the same code."""
        digest = hashlib.sha256()
        for room in sorted(rooms):
            root = self._package / room
            for path in (
                [root] if root.is_file() else sorted(file for kind in ("*.py", *DATA) for file in root.rglob(kind))
            ):
                digest.update(path.relative_to(self._package).as_posix().encode() + b"\0" + self._file(path))
        if HARNESS_ROOM in rooms and self._harness is not None:
            digest.update(f"{HARNESS} {_version('lm-eval')}".encode())
            for path in _harness_files(self._harness):
                name = path.relative_to(self._harness).as_posix()
                digest.update(name.encode() + b"\0" + self._once(path, _plain))
        return digest.hexdigest()[:16]

    def _file(self, path: Path) -> bytes:
        return self._once(path, lambda content: _meaning(content, path.suffix))

    def _once(self, path: Path, digest: Callable[[bytes], bytes]) -> bytes:
        if path not in self._files:
            self._files[path] = digest(path.read_bytes())
        return self._files[path]


@functools.lru_cache(maxsize=2048)
def _meaning(content: bytes, suffix: str) -> bytes:
    """Return the digest of what counts of a file of the package; parsed once for all sessions of a process."""
    if suffix == ".py":
        return _plain(_syntax(_parsed(content)).encode())
    return _plain(_yaml(yaml.compose(content)).encode() if suffix == ".yaml" else content)


def _plain(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _parsed(content: bytes) -> ast.AST:
    try:
        return ast.parse(content)
    except SystemError:  # CPython 3.11 miscounts its own depth now and then (gh-106905)
        return ast.parse(content)


def _installed(package: str) -> Path | None:
    """Return the folder of a package, without importing it; None where it is not installed."""
    spec = find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _harness_files(folder: Path) -> Iterator[Path]:
    """Yield the files of lm-eval that decide how the stock tasks are scored, in order."""
    for part in (folder, *(folder / "tasks" / name for name in STOCK_TASKS)):
        for root, folders, files in os.walk(part):
            skipped = {"__pycache__", ".cache", "tasks" if root == str(folder) else ""}
            folders[:] = sorted(name for name in folders if name not in skipped)
            yield from (Path(root, name) for name in sorted(files) if not name.endswith((".pyc", ".md")))
    yield from sorted((folder / "tasks").glob("*.py"))


def _syntax(node: object) -> str:
    """Return a syntax tree as text; fields that are empty are left out, since versions of Python add such ones."""
    if isinstance(node, ast.AST):
        fields = (
            f"{name}={_syntax(child)}"
            for name, child in ast.iter_fields(node)
            if child is not None and child != [] and name not in ("ctx", "kind", "type_comment")
        )
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(_syntax(child) for child in node if not _idle(child))}]"
    return ascii(node)


def _idle(statement: object) -> bool:
    """Whether a statement does nothing: a docstring, an ellipsis, pass."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass)


def _yaml(node: yaml.Node | None) -> str:
    """Return the nodes of a YAML file as text."""
    if isinstance(node, yaml.MappingNode):
        return f"{{{','.join(f'{_yaml(key)}:{_yaml(item)}' for key, item in node.value)}}}"
    if isinstance(node, yaml.SequenceNode):
        return f"[{','.join(map(_yaml, node.value))}]"
    return "" if node is None else f"{node.tag} {node.value!a}"


def running_code() -> Code:
    """Return what code this is, as it lies on disk now; a session takes it once.

    Git's fields are None where neither git nor the wheel knows.
    """
    digest = CodeDigest()
    sha, dirty = _commit()
    return Code(sha, dirty, scoring=digest.of(SCORING), fitting=digest.of(FITTING))


def collect(device: str, device_name: str, code: Code) -> dict[str, Any]:
    """Return provenance as plain data.

    Args:
        device: that was computed on.
        device_name: what it is called.
        code: that computed.
    """
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


def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of the code and whether it differs from it: of a wheel, as it was built."""
    if COMMIT.is_file():
        built = json.loads(COMMIT.read_text(encoding="utf-8"))
        return built["git_sha"], built["git_dirty"]
    status = _git("status", "--porcelain", "--", str(PACKAGE), ":(top)conf", ":(top)run.py")
    return _git("rev-parse", "HEAD"), None if status is None else bool(status)


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
