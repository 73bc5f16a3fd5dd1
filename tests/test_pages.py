"""What pages name exists: rooms, files, modules, functions. Not of docs/log.md, which is history."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from tests.support.paths import PACKAGE, REPOSITORY

ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = sorted(
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "*/README.md",
        "experiments/*/README.md",
        "tests/golden/README.md",
        "conf/**/*.yaml",
    )
    for path in REPOSITORY.glob(pattern)
    if path.name != "log.md" and not path.parts[-2].startswith(".")
)
#: Made by hand on a GPU.
MADE = {"starquant/kernels/tiles.json", "results/published/efficiency"}
TOPS = "starquant|tests|conf|docs|benchmarks|experiments|notebooks|hydra_plugins|results/paper|results/published"
FILE = re.compile(rf"(?<![\w/.-])((?:{TOPS})/[\w./*-]*[\w*])(?::([A-Za-z_]\w*))?")
SHORT = re.compile(r"`([a-z_]+/[\w/]+\.py)`")
MODULE = re.compile(r"(?<![\w./-])starquant((?:\.[A-Za-z_]\w*)+)")


def label(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def defined(path: Path) -> set[str]:
    """Names at the top level of a file, of a package those of its `__init__`."""
    tree = ast.parse(((path / "__init__.py") if path.is_dir() else path).read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def missing_files(text: str) -> list[str]:
    """Paths that are neither there nor made by a run; `path:name` also where the file does not define the name."""
    missing = []
    for path, name in FILE.findall(text):
        if path in MADE or "NAME" in path:
            continue
        matches = [*REPOSITORY.glob(path), *REPOSITORY.glob(f"{path}.*")]
        if not matches or (name and name not in defined(REPOSITORY / path)):
            missing.append(f"{path}:{name}" if name else path)
    shorts = [short for short in SHORT.findall(text) if (PACKAGE / short.partition("/")[0]).is_dir()]
    return missing + [short for short in shorts if not (PACKAGE / short).exists()]


def missing_modules(text: str) -> list[str]:
    """Dotted names whose module is not there, or does not define what is behind it."""
    missing = []
    for dotted in MODULE.findall(text):
        place, parts = PACKAGE, dotted[1:].split(".")
        while parts and (place.is_dir() and ((place / parts[0]).is_dir() or (place / f"{parts[0]}.py").exists())):
            folder, file = place / parts[0], place / f"{parts[0]}.py"
            place, parts = (folder if folder.is_dir() else file), parts[1:]
        if parts and parts[0] not in defined(place):
            missing.append(f"starquant{dotted}")
    return missing


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name == "extending.md":
        text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not missing_files(text) + missing_modules(text)


def test_a_wrong_name_is_seen() -> None:
    """The judges judge."""
    text = "`starquant/runs/nowhere.py`, `starquant/config/run.py:RunSpek`, `starquant.store.no`, `store/no.py`"
    assert missing_files(text) == ["starquant/runs/nowhere.py", "starquant/config/run.py:RunSpek", "store/no.py"]
    assert missing_modules(text) == ["starquant.store.no"]


def test_the_rooms_are_those_of_the_layers_in_their_order() -> None:
    layers = ast.parse((REPOSITORY / "tests" / "test_layers.py").read_text(encoding="utf-8"))
    tables = [
        node for node in layers.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ALLOWED"
    ]
    listed = [ast.literal_eval(key) for key in tables[0].value.keys]
    rooms = re.findall(r"^\| `(\w+)/` \| \S", ARCHITECTURE, re.MULTILINE)
    assert rooms == [name for name in listed if (PACKAGE / name).is_dir()]
    assert all(f"`starquant/{file.name}`" in ARCHITECTURE for file in PACKAGE.glob("*.py") if file.stem != "__init__")


def test_a_run_is_a_numbered_path() -> None:
    run = ARCHITECTURE.partition("## One run")[2].partition("\n## ")[0]
    steps = re.findall(r"^(\d+)\. (.+(?:\n    ?.+)*)", run, re.MULTILINE)
    assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1))
    assert all(re.search(r"`starquant/[\w/]+\.py|The method's `apply`", step) for _, step in steps)


#: `key.of.the.configuration`, also with `=value`, where its first part is a field of a run's description.
KEY = re.compile(rf"(?<![\w./-])((?:{'|'.join(RunSpec.model_fields)})(?:\.[a-z_0-9]+)+)(?=[`= ,;)\]]|$)", re.MULTILINE)
#: Dotted names that begin likewise: files, and attributes of models.
NO_KEYS = re.compile(
    r"\.(py|md|yaml|json|jsonl|csv)$|^model\.(original_basis|to_original_basis|quantized|safetensors)$"
)


def unknown_keys(text: str) -> list[str]:
    """Keys that no class of a run's description has."""
    return [key for key in KEY.findall(text) if not NO_KEYS.search(key) and not known([RunSpec], key.split("."))]


def known(classes: list[Any], parts: list[str]) -> bool:
    """Whether one of the classes has the first part as a field, and the class of that field the others."""
    if not parts:
        return True
    fields = [one.model_fields[parts[0]].annotation for one in classes if parts[0] in getattr(one, "model_fields", {})]
    if not fields:
        return False
    if parts[0] == "method":
        return known([METHODS.options(name) for name in METHODS], parts[1:])
    kinds = [kind for field in fields for kind in (field, *get_args(field))]
    return any(kind is dict or get_origin(kind) is dict for kind in kinds) or known(kinds, parts[1:])


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=label)
def test_every_configuration_key_that_a_page_names_is_one(page: Path) -> None:
    assert unknown_keys(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("`calibration.states.sampler`", []),
        ("`calibration.masked_states.sampler`", ["calibration.masked_states.sampler"]),
        ("run method.tac.block_size=16 bits.attention.v=4", []),
        ("method.tac.blocksize=16", ["method.tac.blocksize"]),
        ("starquant/calibration/states.py and `calibration.states`", []),
    ],
)
def test_a_key_that_is_none_is_seen(text: str, unknown: list[str]) -> None:
    assert unknown_keys(text) == unknown
