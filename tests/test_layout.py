"""Test modules stand alone: what several of them use lies in tests/support, and none imports another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

TESTS = REPOSITORY / "tests"
MOST_LINES = 300  # of a file of helpers


def imported(code: str) -> Iterator[str]:
    """Every dotted name that code imports, at any depth; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def of_tests(code: str) -> list[str]:
    """The imports of another test module or of conftest."""
    return [
        name
        for name in imported(code)
        if any(part == "conftest" or part.startswith("test_") for part in name.split("."))
    ]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_test_module_is_imported(path: Path) -> None:
    assert of_tests(path.read_text()) == []


@pytest.mark.parametrize(
    "code",
    [
        "from tests.config.test_run import spec",
        "from tests.methods.test_contract import fresh",
        "from tests.methods import test_contract",
        "import tests.methods.test_contract as contract",
        "from tests.conftest import GOLDEN",
        "from tests import conftest",
        "from .test_spec import spec",
        "from . import test_spec",
        "def late():\n    from test_spec import spec",
    ],
)
def test_an_import_of_a_test_module_is_found(code: str) -> None:
    assert len(of_tests(code)) == 1


def test_helpers_stay_short() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in (TESTS / "support").glob("*.py")}
    assert len(lines) > 5
    assert {name for name, count in lines.items() if count >= MOST_LINES} == set()
