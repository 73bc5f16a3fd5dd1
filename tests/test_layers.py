"""Who may import whom: the rooms of docs/architecture.md, kept by reading every import of every file.

Imports inside functions count; only those under `TYPE_CHECKING` do not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "starquant"
ROOT_FILES = {"__init__.py", "__main__.py", "commands.py", "errors.py", "registry.py", "resources.py"}
#: Longest file, in lines.
LONGEST = 300


@dataclass(frozen=True)
class Room:
    """What a room may import beside the standard library and itself: lower rooms, and packages of others."""

    rooms: str = ""
    packages: str = ""


#: From the ground up. A room that only decides a run's bookkeeping (config, store, reports, ...) imports no torch.
ALLOWED = {
    "__init__": Room(),
    "commands": Room(),
    "errors": Room(),
    "resources": Room(),
    "registry": Room("errors"),
    "config": Room("errors registry", "pydantic"),
    "numerics": Room("errors", "torch"),
    "statistics": Room("", "numpy"),
    "session": Room("errors", "torch accelerate filelock tqdm"),
    "store": Room("errors config session", "pydantic filelock yaml numpy pyarrow"),
    "diffusion": Room("errors", "torch numpy psutil"),
    "models": Room(
        "errors registry numerics store diffusion",
        "torch transformers safetensors huggingface_hub",
    ),
    "testbed": Room("errors store models", "torch transformers safetensors tokenizers tqdm gguf huggingface_hub"),
    "kernels": Room("errors numerics", "torch triton"),
    "quantized": Room("errors config numerics session store models kernels", "torch"),
    "calibration": Room(
        "errors config numerics session diffusion models testbed quantized", "torch transformers datasets"
    ),
    "methods": Room("errors config numerics session store models quantized calibration", "torch safetensors"),
    "packed": Room(
        "errors config numerics session store diffusion models testbed kernels quantized",
        "torch transformers safetensors huggingface_hub",
    ),
    "llama_cpp": Room(
        "errors config numerics store diffusion models quantized", "torch numpy transformers gguf llama_cpp"
    ),
    "evaluation": Room(
        "errors config numerics statistics session store diffusion models testbed calibration",
        "torch transformers datasets lm_eval yaml",
    ),
    "reports": Room(
        "errors resources config statistics store",
        "numpy pandas matplotlib PIL yaml jinja2 markupsafe altair vl_convert",
    ),
    "tracking": Room("errors config session store reports", "wandb"),
    "runs": Room(
        "errors config session store diffusion models testbed quantized calibration methods packed llama_cpp "
        "evaluation tracking",
        "torch transformers",
    ),
    "forecast": Room(
        "errors config session store models quantized calibration methods evaluation reports runs", "torch psutil"
    ),
    "sweeps": Room(
        "commands errors resources config session store reports runs forecast", "hydra omegaconf pydantic tqdm yaml"
    ),
    "__main__": Room("__init__ commands errors session"),
}


@dataclass(frozen=True)
class Import:
    """One imported module or name, and where."""

    path: Path
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(PACKAGE.parent)}:{self.line} imports {self.module}"


FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from nodes(other)
        else:
            yield node
            yield from nodes(node)


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = ["starquant", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> Iterator[Import]:
    """What a file imports; `from a import b` is `a.b` where that is a module of the package, else `a`."""
    for node in nodes(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(path, node.lineno, whole if whole in MODULES else str(node.module))


def room_of(path: Path) -> str:
    """The room of a file: its folder, or itself at the root."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_is_in_the_table_and_the_table_has_no_other() -> None:
    rooms = {room_of(path) for path in FILES}
    assert not rooms - {*ALLOWED}, "rooms that are in no list"
    assert not {*ALLOWED} - rooms, "lists of no room"
    assert {path.name for path in PACKAGE.glob("*.py")} <= ROOT_FILES
    assert not [
        path
        for path in PACKAGE.iterdir()
        if path.is_dir() and path.name != "__pycache__" and not (path / "__init__.py").exists()
    ]


def roof(one: Import) -> str:
    """The room, or the package of others, that an import leads to."""
    top, _, rest = one.module.partition(".")
    return (rest.split(".")[0] or "__init__") if top == "starquant" else top


@pytest.mark.parametrize("room", [room for room in ALLOWED if room != "__main__"])  # which imports by name
def test_a_room_may_import_nothing_that_it_does_not(room: str) -> None:
    used = {roof(one) for path in FILES if room_of(path) == room for one in imports(path)}
    assert not {*ALLOWED[room].rooms.split(), *ALLOWED[room].packages.split()} - used


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_what_it_may(room: str) -> None:
    rooms, packages = ALLOWED[room].rooms.split(), ALLOWED[room].packages.split()
    wrong = []
    for path in FILES:
        for one in imports(path) if room_of(path) == room else ():
            if one.module.partition(".")[0] == "starquant":
                allowed = roof(one) in (room, *rooms)
            else:
                allowed = roof(one) in sys.stdlib_module_names or roof(one) in packages
            if not allowed:
                wrong.append(str(one))
    assert not wrong, "\n".join(wrong)


def test_rooms_stand_on_lower_ones() -> None:
    order = list(ALLOWED)
    for room, allowed in ALLOWED.items():
        for lower in allowed.rooms.split():
            assert order.index(lower) < order.index(room), f"{room} imports {lower}, which stands above it"


def test_no_circle_of_files() -> None:
    """That importing a module runs its package's `__init__` first is not counted: rooms have no circle themselves."""
    graph = {module_of(path): {one.module for one in imports(path) if one.module in MODULES} for path in FILES}
    try:
        TopologicalSorter({name: lower - {name} for name, lower in graph.items()}).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


@pytest.mark.parametrize("module", ["config.run", "store.records", "reports.run_table", "tracking", "runs.preflight"])
def test_what_judges_and_reports_imports_no_torch(module: str) -> None:
    code = (
        f"import sys, starquant.{module}; print([m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_only_one_file_imports_wandb() -> None:
    users = [path for path in FILES if any(one.module.split(".")[0] == "wandb" for one in imports(path))]
    assert [path.relative_to(PACKAGE).as_posix() for path in users] == ["tracking/wandb_worker.py"]


def test_no_pickle_and_no_remote_code_anywhere() -> None:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
                tops = {name.split(".")[0] for name in names}
                assert not {"pickle", "dill", "joblib", "cloudpickle"} & tops, path
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                raise AssertionError(f"{path} passes trust_remote_code")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
                raise AssertionError(f"{path} uses {ast.unparse(node)}")


def test_files_stay_readable() -> None:
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST, path
