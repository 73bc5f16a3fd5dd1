"""How names read: they say what they hold; judging input is called `validate`, preconditions of our code `require`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from starquant import errors

REPOSITORY = Path(__file__).resolve().parent.parent
#: Folders whose names are read.
ROOMS = ("starquant", "hydra_plugins", "benchmarks")
#: Participles that say how a thing was come by, not what it is.
EMPTY = {"found", "told", "asked", "given"}
#: Other verbs for judging what a user gave; `require` is for preconditions of our own code, which raise no such error.
SYNONYM = re.compile(r"_*(check|judge|expect|ensure|require)(s|d|ed)?(_|$)")
USER_ERRORS = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.StarquantError)
}


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield every name that a file makes or uses, with its line."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg is not None:
            yield line, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield line, node.name
        elif isinstance(node, ast.alias):
            yield line, (node.asname or node.name).rpartition(".")[2]
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name is not None:
            yield line, node.name
        elif isinstance(node, ast.MatchMapping) and node.rest is not None:
            yield line, node.rest


def empty_names(tree: ast.AST) -> list[tuple[int, str]]:
    """Return names that are one of these participles, alone or between underscores."""
    return [(line, name) for line, name in names(tree) if EMPTY & set(name.lower().split("_"))]


def synonyms(tree: ast.AST) -> list[tuple[int, str]]:
    """Return functions that judge input and are named by another verb than `validate`.

    A function judges that raises a user's error, itself or through others of its file.
    """
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    judges = {node.name for node in functions if USER_ERRORS & set(_raised(node))}
    while more := {node.name for node in functions if judges & set(_called(node))} - judges:
        judges |= more
    return [(node.lineno, node.name) for node in functions if node.name in judges and SYNONYM.match(node.name)]


def _last(node: ast.AST) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _raised(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield _last(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)


def _called(function: ast.AST) -> Iterator[str]:
    yield from (_last(node.func) for node in ast.walk(function) if isinstance(node, ast.Call))


def files(room: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield the path of each file of a room, and its syntax tree."""
    paths = sorted((REPOSITORY / room).rglob("*.py"))
    assert paths, f"{room}: has no file"
    for path in paths:
        yield path.relative_to(REPOSITORY).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("room", ROOMS)
def test_names_say_what_they_hold(room: str) -> None:
    wrong = [f"{path}:{line}: {name}" for path, tree in files(room) for line, name in empty_names(tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ROOMS)
def test_judging_input_is_called_validate(room: str) -> None:
    wrong = [f"{path}:{line}: {name}" for path, tree in files(room) for line, name in synonyms(tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "found = 1",
        "x.told_of = 1",
        "def f(asked): ...",
        "def is_given(): ...",
        "f(_found=1)",
        "for given_a, b in c: ...",
        "import a as found",
        "try: ...\nexcept E as told: ...",
        "lambda *asked: 0",
        "class Given: ...",
    ],
)
def test_an_empty_name_is_seen(code: str) -> None:
    assert len(empty_names(ast.parse(code))) == 1


@pytest.mark.parametrize("code", ["foundation = forgiven(1)", "'found'", "# told\nx = 1", "f'{x} given'"])
def test_other_words_are_let_pass(code: str) -> None:
    assert not empty_names(ast.parse(code))


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("def check_data(x):\n    if x: raise DataError(x)", True),
        ("def _judge(x):\n    for y in x: raise errors.ConfigError(y) from None", True),
        ("def ensure(x): raise CheckpointError", True),
        ("class A:\n    async def expect_b(self): raise ConfigError('')", True),
        ("def _line(x): raise DataError(x)\ndef check_file(x): return [_line(y) for y in x]", True),
        ("def _checked(x): raise DataError(x)", True),
        ("def validate_data(x): raise DataError(x)", False),
        ("def checkpoint_of(x): raise CheckpointError(x)", False),
        ("def require_card(x): raise DeviceError(x)", True),
        ("def expect_record(x): raise RecordError(x)", True),
        ("def require_rows(x): raise ValueError(x)", False),
        ("def check_sum(x): return x", False),
        ("def check(x): raise ValueError(x)", False),
    ],
)
def test_a_synonym_is_seen_where_it_judges(code: str, seen: bool) -> None:
    assert bool(synonyms(ast.parse(code))) is seen
