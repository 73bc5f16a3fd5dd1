"""Who may import whom: the architecture of docs/architecture.md, kept by reading the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.paths import PACKAGE

# Room (or file) -> what it must never import, at any depth of its own code.
_PROGRAM = ("hydra", "lm_eval", "wandb")
_FAMILIES = ("starquant.models.llada", "starquant.models.dream")


def _rooms(*names: str) -> tuple[str, ...]:
    return tuple(f"starquant.{name}" for name in names)


FORBIDDEN = {
    "bits.py": ("torch", "transformers", *_PROGRAM),
    "sources.py": ("torch", "transformers", *_PROGRAM),
    "spec.py": ("torch", "transformers", "numpy", "pandas", *_PROGRAM),
    "protocol.py": ("torch", "transformers", *_PROGRAM),
    "preflight.py": ("torch", "transformers", *_PROGRAM),
    "registry.py": ("torch", *_PROGRAM),
    "errors.py": ("torch", "pydantic", *_PROGRAM),
    "numerics": (
        "transformers",
        *_PROGRAM,
        *_rooms("models", "diffusion", "methods", "runtime", "evaluation", "records", "tracking", "tables", "testbed"),
        "starquant.config.run",
    ),
    "models": (
        *_PROGRAM,
        *_rooms("methods", "calibration", "evaluation", "tracking", "runtime", "testbed", "diffusion"),
    ),
    "calibration": (*_PROGRAM, *_rooms("methods", "evaluation", "tracking", "tables", "records"), *_FAMILIES),
    "diffusion": (*_PROGRAM, *_rooms("methods", "evaluation", "models", "runtime")),
    "methods": (*_PROGRAM, *_rooms("evaluation", "tracking"), *_FAMILIES),
    "runtime": (*_PROGRAM, *_rooms("evaluation", "methods", "tracking", "calibration"), *_FAMILIES),
    "kernels": (
        "transformers",
        *_PROGRAM,
        *_rooms("models", "methods", "runtime", "diffusion", "evaluation", "records"),
    ),
    "export.py": ("lm_eval", "hydra", "wandb", *_rooms("methods", "calibration", "evaluation")),
    "plugin.py": (*_PROGRAM, *_rooms("methods", "calibration", "evaluation", "records", "tables")),
    "generate.py": ("lm_eval", "hydra", "wandb", *_rooms("methods", "calibration", "evaluation", "records", "tables")),
    "evaluation": ("hydra", "wandb", *_rooms("methods", "calibration", "runtime", "tracking")),
    "records": ("torch", "transformers", *_PROGRAM),
    "tracking": ("torch", "transformers", "lm_eval", "hydra"),
    "tables": ("torch", "transformers", *_PROGRAM),
    "testbed": (*_PROGRAM, *_rooms("methods", "evaluation", "runtime", "tracking")),
    "stages.py": ("hydra", "argparse", "wandb", "starquant.methods"),
    "loaded.py": ("hydra", "argparse", "wandb"),
    "calibrating.py": ("hydra", "argparse", "wandb", "lm_eval", "starquant.evaluation"),
    "processes.py": ("hydra", "argparse", "wandb", "lm_eval"),
    "devices.py": _PROGRAM,
    "watching.py": ("torch", "transformers", *_PROGRAM),
    "composing.py": ("torch", "transformers", "lm_eval", "wandb", "starquant.runs.execute"),
    "status.py": ("torch", "transformers", *_PROGRAM, "starquant.runs.execute"),
    "diagnostics": (*_PROGRAM, *_rooms("methods", "evaluation", "tracking")),
    "pipeline.py": ("hydra", "argparse", "wandb"),
}


def _imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _files(room: str) -> list[Path]:
    path = PACKAGE / room
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_keep_their_doors_shut(room: str) -> None:
    files = _files(room)
    assert files
    for path in files:
        for module in _imports(path):
            for bad in FORBIDDEN[room]:
                assert not (module == bad or module.startswith(bad + ".")), f"{path} imports {module}"


def test_only_one_file_imports_wandb() -> None:
    users = [p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if "wandb" in _imports(p)]
    assert users == ["tracking/wandb_worker.py"]


def test_method_files_import_nothing_heavy_at_module_level() -> None:
    for path in sorted((PACKAGE / "methods").glob("*.py")):
        heavy = {"torch", "transformers", "starquant.quantized", "starquant.models", "starquant.numerics"}
        assert not _imports(path, top_level_only=True) & heavy, path


def test_no_pickle_and_no_remote_code_anywhere() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not {"pickle", "dill", "joblib", "cloudpickle"} & _imports(path), path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                raise AssertionError(f"{path} passes trust_remote_code")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
                raise AssertionError(f"{path} uses {ast.unparse(node)}")


def test_files_stay_readable() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path
