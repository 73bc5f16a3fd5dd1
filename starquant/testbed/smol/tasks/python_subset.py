"""A small subset of Python for programs that a model writes: they are interpreted here, never handed to Python.

A program is one function of one parameter: assignments, `if`, `for`, `while`, `return`, expressions of integers,
strings, lists and comprehensions, calls of itself and of listed builtins and methods. What is accepted gives what
CPython gives. Steps, sizes, depth and source length are limited, so that no program takes longer than about a second.
"""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from starquant.testbed.smol.tasks.python_interpreter import Interpreter
from starquant.testbed.smol.tasks.python_operations import OPERATORS, ProgramError

#: Characters of a program.
MAX_SOURCE = 4_000
_ALLOWED: tuple[type[ast.AST], ...] = (
    *(ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Expr, ast.Pass),
    *(ast.Assign, ast.AugAssign, ast.If, ast.For, ast.While, ast.Break, ast.Continue),
    *(ast.Constant, ast.Name, ast.List, ast.Tuple, ast.ListComp, ast.GeneratorExp, ast.comprehension),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Subscript, ast.Slice),
    *(ast.Call, ast.keyword, ast.Attribute, ast.expr_context),
    *OPERATORS,
)
#: What ends a program of Python, too.
_FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError)


def run(source: str, entry_point: str, argument: Any) -> Any:
    """Return what the program's function returns; the argument itself is not changed.

    Raises:
        ProgramError: the text is no program of the subset, it fails, or it exceeds a limit.
    """
    return next(run_each(source, entry_point, [argument]))


def run_each(source: str, entry_point: str, arguments: Iterable[Any]) -> Iterator[Any]:
    """Yield what the function returns for each argument, as `run` does."""
    function = _parse(source, entry_point)
    for argument in arguments:
        try:
            yield Interpreter(function).call(copy.deepcopy(argument))
        except ProgramError:
            raise
        except _FAILURES as error:
            raise ProgramError(f"{type(error).__name__}: {error}") from error


def solves(source: str, entry_point: str, cases: Sequence[Sequence[Any]]) -> bool:
    """Whether the program returns what each (argument, expected) says, of the same type; what is refused does not."""
    values = run_each(source, entry_point, (argument for argument, _ in cases))
    try:
        return bool(cases) and all(_same(value, expected) for value, (_, expected) in zip(values, cases, strict=True))
    except ProgramError:
        return False


def _same(value: Any, expected: Any) -> bool:
    if type(value) is not type(expected):
        return False
    if isinstance(value, list):
        return len(value) == len(expected) and all(map(_same, value, expected))
    return bool(value == expected)


def _parse(source: str, entry_point: str) -> ast.FunctionDef:
    if len(source) > MAX_SOURCE:
        raise ProgramError(f"has more than {MAX_SOURCE} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
            compile(tree, "<program>", "exec", dont_inherit=True)  # refuses what parses and is wrong, and runs nothing
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ProgramError(f"does not parse: {error}") from error
    match tree.body:
        case [ast.FunctionDef() as function] if function.name == entry_point:
            pass
        case _:
            raise ProgramError(f"is not one function '{entry_point}'")
    for node in ast.walk(function):
        if not isinstance(node, _ALLOWED) or (isinstance(node, ast.FunctionDef) and node is not function):
            raise ProgramError(f"{type(node).__name__} is not in the subset")
        if isinstance(node, ast.For | ast.While) and node.orelse:
            raise ProgramError("'else' of a loop is not in the subset")
    parameters = function.args
    plain = ast.arguments(posonlyargs=[], args=parameters.args, kwonlyargs=[], kw_defaults=[], defaults=[])
    if (
        len(parameters.args) != 1
        or ast.dump(parameters) != ast.dump(plain)
        or function.decorator_list
        or function.returns
        or parameters.args[0].annotation
    ):
        raise ProgramError("is not a plain function of one parameter")
    return function
