"""The safe expression language: what it computes, against Python's own parser, and what it refuses."""

from __future__ import annotations

import ast
import operator
import random

import pytest

from starquant.testbed.tiny.expressions import MAX_TOKENS, MAX_VALUE, ExpressionError, evaluate
from starquant.testbed.tiny.programs import solves

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def _program(rng: random.Random, depth: int) -> str:
    """A random program of the language; numbers without leading zeros, so that it is Python, too."""
    kind = rng.random()
    if depth == 0 or kind < 0.25:
        return rng.choice(["x", "x", str(rng.randint(0, 9)), str(rng.randint(0, 99)), str(rng.randint(0, 99_999))])
    if kind < 0.45:
        return f"( {_program(rng, depth - 1)} )"
    return f" {rng.choice('+-*')} ".join(_program(rng, depth - 1) for _ in range(rng.randint(2, 3)))


def _reference(program: str, x: int) -> int | None:
    """Return the value of a Python expression, None where some result is out of range."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return x
        assert isinstance(node, ast.BinOp)
        result = OPERATORS[type(node.op)](value(node.left), value(node.right))
        if abs(result) > 10**6:
            raise OverflowError
        return result

    try:
        found = value(ast.parse(program, mode="eval").body)
    except OverflowError:
        return None
    assert found == eval(program, {"__builtins__": {}}, {"x": x})
    return found


def test_values_are_pythons() -> None:
    rng = random.Random(20240229)
    compared = refused = 0
    while compared < 2_000:
        program, x = _program(rng, 4), rng.randint(-50, 50)
        expected = _reference(program, x)
        if expected is None or len(program.split()) > MAX_TOKENS:
            refused += 1
            with pytest.raises(ExpressionError):
                evaluate(program, x)
        else:
            compared += 1
            assert evaluate(program, x) == expected, program
    assert refused > 100


def test_whatever_is_accepted_has_pythons_value() -> None:
    rng = random.Random(7)
    words = "x x x 1 2 30 + + - * * ( ) ( ) ** / // % . , = y -1 +x 1.5 0x1 1_0 ~ not lambda [ ] x.real".split()
    common = words[:15]
    accepted = 0
    for _ in range(20_000):
        program = " ".join(rng.choices(common if rng.random() < 0.8 else words, k=rng.randint(1, 7)))
        try:
            found = evaluate(program, 3)
        except ExpressionError:
            continue
        accepted += 1
        assert found == _reference(program, 3), program
    assert accepted > 300


@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("x", 5),
        ("2 + 3 * x", 17),
        ("( 2 + 3 ) * x", 25),
        ("9 - 3 - 2", 4),
        ("9 - ( 3 - 2 )", 8),
        ("  x\t*\n x  ", 25),
        ("0 * 99999", 0),
        ("1 - 9", -8),
        ("999999 + 1", 10**6),
        ("0 - 999999 - 1", -(10**6)),
    ],
)
def test_precedence_and_range(program: str, value: int) -> None:
    assert evaluate(program, 5) == value


@pytest.mark.parametrize(
    "program",
    [
        "",
        " \n ",
        "x x",
        "2 x",
        "x +",
        "+ x",
        "- 1",
        "x * * 2",
        "x ** 2",
        "x / 2",
        "x+1",
        "(x)",
        "y",
        "X",
        "( x",
        "x )",
        ") x (",
        "( )",
        "( x + 1",
        "( x + 1 ) )",
        "x + 1 ;",
        "x + 1 # comment",
        "__import__",
        "__import__ ( 'os' )",
        "x . real",
        "lambda",
        "-1",
        "1.5",
        "1e3",
        "0x10",
        "1_000",
        "\u0663",  # ARABIC-INDIC DIGIT THREE
        "\u00b2",  # SUPERSCRIPT TWO
        "\uff13 + 1",  # FULLWIDTH DIGIT THREE
        "\u0445",  # CYRILLIC SMALL LETTER HA
        "1000000",
        "999999 + 2",
        "999999 * 999999",
        "0 - 999999 - 2",
        "999999 * 2 - 999999",  # on the way
        "0 * ( 999999 * 2 )",
    ],
)
def test_anything_else_is_refused(program: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(program, 5)
    assert not solves(program, [(5, 5)])


def test_length_is_limited() -> None:
    assert evaluate("1" + " + 1" * 31, 0) == 32  # 63 tokens
    assert evaluate("( 1 )" + " + 1" * 30 + " ", 0) == 31
    with pytest.raises(ExpressionError, match="1 to 64 tokens, got 65"):
        evaluate("1" + " + 1" * 32, 0)


@pytest.mark.parametrize("count", [60, 64, 65, 1_000_000])
@pytest.mark.parametrize("token", ["(", ")", "x", "+", "7", "( 1 +"])
def test_deep_or_long_text_does_no_harm(token: str, count: int) -> None:
    with pytest.raises(ExpressionError):
        evaluate(f"{token} " * count, 1)


def test_as_deep_as_the_length_allows() -> None:
    assert evaluate("( " * 31 + "x" + " )" * 31, 7) == 7


def test_a_long_word_is_refused_quickly() -> None:
    with pytest.raises(ExpressionError):
        evaluate("9" * 1_000_000, 1)  # Python refuses int() of so many digits with another error


def test_a_program_solves_all_pairs_or_none() -> None:
    assert MAX_VALUE == 10**6
    assert solves("2 * x + 1", [(0, 1), (3, 7)])
    assert solves("x + x + 1", [(0, 1), (3, 7)])
    assert not solves("2 * x + 1", [(0, 1), (3, 8)])
    assert not solves("x * 999999", [(1, 999_999), (2, 1_999_998)])
