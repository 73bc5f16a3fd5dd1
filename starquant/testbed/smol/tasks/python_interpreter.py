"""What the nodes of a program of the Python subset do, statement by statement and expression by expression."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from starquant.testbed.smol.tasks.python_operations import (
    BUILTINS,
    KEYS,
    METHOD_KEYWORDS,
    METHODS,
    Budget,
    ProgramError,
    binary,
    compare,
    unary,
)

#: Expressions and calls within one another.
MAX_DEPTH = 100

Scope = dict[str, Any]


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


def _stored(nodes: Sequence[ast.AST]) -> set[str]:
    names = (name for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


class Interpreter:
    """Calls of a function; a method for each type of node.

    Args:
        function: of one parameter, of the subset's nodes only.
    """

    def __init__(self, function: ast.FunctionDef) -> None:
        self.function = function
        self.parameter = function.args.args[0].arg
        self.variables = _stored([function]) | {self.parameter}
        self.budget, self.depth = Budget(), 0

    def call(self, argument: Any) -> Any:
        """Return what the function returns, with the steps that earlier calls left."""
        try:
            self._block(self.function.body, {self.parameter: argument})
        except _Return as result:
            return result.value
        return None

    def _block(self, statements: Sequence[ast.stmt], scope: Scope) -> None:
        for statement in statements:
            self.budget.spend()
            getattr(self, f"_do_{type(statement).__name__}")(statement, scope)

    def _do_Pass(self, statement: ast.Pass, scope: Scope) -> None:
        pass

    def _do_Break(self, statement: ast.Break, scope: Scope) -> None:
        raise _Break

    def _do_Continue(self, statement: ast.Continue, scope: Scope) -> None:
        raise _Continue

    def _do_Return(self, statement: ast.Return, scope: Scope) -> None:
        raise _Return(None if statement.value is None else self._value(statement.value, scope))

    def _do_Expr(self, statement: ast.Expr, scope: Scope) -> None:
        self._value(statement.value, scope)

    def _do_Assign(self, statement: ast.Assign, scope: Scope) -> None:
        value = self._value(statement.value, scope)
        for target in statement.targets:
            self._assign(target, value, scope)

    def _do_AugAssign(self, statement: ast.AugAssign, scope: Scope) -> None:
        target = statement.target
        if isinstance(target, ast.Subscript):
            container, index = self._value(target.value, scope), self._index(target.slice, scope)
            old = container[index]
            container[index] = self._augmented(statement, old, scope)
            self.budget.pay(container)
        elif isinstance(target, ast.Name):
            old = self._get_Name(target, scope)
            scope[target.id] = self._augmented(statement, old, scope)
        else:
            raise ProgramError("attributes are not in the subset")

    def _augmented(self, statement: ast.AugAssign, old: Any, scope: Scope) -> Any:
        return self.budget.pay(binary(statement.op, old, self._value(statement.value, scope), in_place=True))

    def _do_If(self, statement: ast.If, scope: Scope) -> None:
        self._block(statement.body if self._value(statement.test, scope) else statement.orelse, scope)

    def _do_While(self, statement: ast.While, scope: Scope) -> None:
        while self._value(statement.test, scope):
            if not self._completes(statement.body, scope):
                break

    def _do_For(self, statement: ast.For, scope: Scope) -> None:
        for element in self._operand(statement.iter, scope):
            self.budget.spend()
            self._assign(statement.target, element, scope)
            if not self._completes(statement.body, scope):
                break

    def _completes(self, body: Sequence[ast.stmt], scope: Scope) -> bool:
        """Run a loop's body once; False after `break`."""
        try:
            self._block(body, scope)
        except _Continue:
            pass
        except _Break:
            return False
        return True

    def _assign(self, target: ast.expr, value: Any, scope: Scope) -> None:
        if isinstance(target, ast.Name):
            scope[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            parts = list(value)
            if len(parts) != len(target.elts):
                raise ProgramError(f"{len(parts)} values for {len(target.elts)} names")
            for one, part in zip(target.elts, parts, strict=True):
                self._assign(one, part, scope)
        elif isinstance(target, ast.Subscript):
            container = self._value(target.value, scope)
            container[self._index(target.slice, scope)] = value
            self.budget.pay(container)
        else:
            raise ProgramError("attributes are not in the subset")

    def _index(self, node: ast.expr, scope: Scope) -> int:
        index = self._value(node, scope)
        if not isinstance(index, int):
            raise ProgramError("only single elements are assigned")
        return index

    def _value(self, node: ast.expr, scope: Scope) -> Any:
        """Return an expression's value, which may be kept."""
        value = self._operand(node, scope)
        if isinstance(value, Iterator):
            raise ProgramError("an iterator is kept, not read at once")
        return value

    def _operand(self, node: ast.expr, scope: Scope) -> Any:
        """Return an expression's value, an iterator too, for what reads it at once."""
        self.budget.spend()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ProgramError(f"is more than {MAX_DEPTH} expressions and calls deep")
        try:
            return self.budget.pay(getattr(self, f"_get_{type(node).__name__}")(node, scope))
        finally:
            self.depth -= 1

    def _get_Constant(self, node: ast.Constant, scope: Scope) -> Any:
        if node.value is not None and not isinstance(node.value, int | str):
            raise ProgramError(f"{type(node.value).__name__} is not in the subset")
        return node.value

    def _get_Attribute(self, node: ast.Attribute, scope: Scope) -> Any:
        raise ProgramError("attributes are not in the subset, methods are called")

    def _get_Name(self, node: ast.Name, scope: Scope) -> Any:
        if node.id not in scope:
            raise ProgramError(f"'{node.id}' has no value")
        return scope[node.id]

    def _get_List(self, node: ast.List, scope: Scope) -> list[Any]:
        return [self._value(element, scope) for element in node.elts]

    def _get_Tuple(self, node: ast.Tuple, scope: Scope) -> tuple[Any, ...]:
        return tuple([self._value(element, scope) for element in node.elts])

    def _get_BinOp(self, node: ast.BinOp, scope: Scope) -> Any:
        left = self._value(node.left, scope)
        return binary(node.op, left, self._value(node.right, scope))

    def _get_UnaryOp(self, node: ast.UnaryOp, scope: Scope) -> Any:
        return unary(node.op, self._value(node.operand, scope))

    def _get_BoolOp(self, node: ast.BoolOp, scope: Scope) -> Any:
        decides = isinstance(node.op, ast.Or)
        for operand in node.values:
            value = self._value(operand, scope)
            if bool(value) is decides:
                break
        return value

    def _get_Compare(self, node: ast.Compare, scope: Scope) -> Any:
        left, result = self._value(node.left, scope), True
        for kind, operand in zip(node.ops, node.comparators, strict=True):
            right = self._value(operand, scope)
            result = compare(kind, left, right)
            if not result:
                break
            left = right
        return result

    def _get_IfExp(self, node: ast.IfExp, scope: Scope) -> Any:
        return self._value(node.body if self._value(node.test, scope) else node.orelse, scope)

    def _get_Subscript(self, node: ast.Subscript, scope: Scope) -> Any:
        container = self._value(node.value, scope)
        return container[self._value(node.slice, scope)]

    def _get_Slice(self, node: ast.Slice, scope: Scope) -> slice:
        return slice(*(part and self._value(part, scope) for part in (node.lower, node.upper, node.step)))

    def _get_ListComp(self, node: ast.ListComp, scope: Scope) -> list[Any]:
        return list(self._get_GeneratorExp(node, scope))

    def _get_GeneratorExp(self, node: ast.GeneratorExp | ast.ListComp, scope: Scope) -> Iterator[Any]:
        """The first iterable is evaluated now and outside, the rest as elements are read, with names of its own."""
        first = iter(self._operand(node.generators[0].iter, scope))
        own = _stored([clause.target for clause in node.generators])
        inner = {name: value for name, value in scope.items() if name not in own}
        return self._elements(node.elt, node.generators, first, inner)

    def _elements(
        self, element: ast.expr, clauses: Sequence[ast.comprehension], values: Iterable[Any], scope: Scope
    ) -> Iterator[Any]:
        clause, *rest = clauses
        for value in values:
            self.budget.spend()
            self._assign(clause.target, value, scope)
            if all(self._value(test, scope) for test in clause.ifs):
                if rest:
                    yield from self._elements(element, rest, self._operand(rest[0].iter, scope), scope)
                else:
                    yield self._value(element, scope)

    def _get_Call(self, node: ast.Call, scope: Scope) -> Any:
        if isinstance(node.func, ast.Attribute):
            return self._method(node, node.func, scope)
        if not isinstance(node.func, ast.Name) or node.func.id in self.variables:
            raise ProgramError("only functions and methods are called")
        name = node.func.id
        if name == self.function.name:
            [argument] = [self._value(argument, scope) for argument in node.args]
            self._keywords(node, (), scope)
            return self.call(argument)
        if name not in BUILTINS:
            raise ProgramError(f"'{name}' is no function of the subset")
        function, keywords = BUILTINS[name]
        arguments = [self._operand(argument, scope) for argument in node.args]
        return function(*arguments, **self._keywords(node, keywords, scope))

    def _method(self, node: ast.Call, attribute: ast.Attribute, scope: Scope) -> Any:
        receiver, name = self._value(attribute.value, scope), attribute.attr
        methods = METHODS.get(type(receiver), {})
        if name not in methods:
            raise ProgramError(f"'{name}' of {type(receiver).__name__} is not in the subset")
        evaluate = self._operand if name == "join" else self._value  # a list must not grow from an iterator of itself
        arguments = [evaluate(argument, scope) for argument in node.args]
        result = methods[name](receiver, *arguments, **self._keywords(node, METHOD_KEYWORDS.get(name, ()), scope))
        self.budget.pay(receiver)
        return result

    def _keywords(self, node: ast.Call, allowed: Sequence[str], scope: Scope) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg not in allowed:
                raise ProgramError(f"argument '{keyword.arg}' is not in the subset")
            if keyword.arg != "key":
                values[keyword.arg] = self._value(keyword.value, scope)
            elif (
                isinstance(keyword.value, ast.Name)
                and keyword.value.id in KEYS
                and keyword.value.id not in self.variables
            ):
                values["key"] = KEYS[keyword.value.id]
            else:
                raise ProgramError("'key' is not a builtin of the subset")
        return values
