"""The tiny safe expression language of the program tasks: integers, x, + - * and parentheses.

Programs are interpreted here, never handed to Python; length and magnitude are bounded.
"""

from __future__ import annotations

MAX_TOKENS, MAX_VALUE = 64, 10**6


class ExpressionError(ValueError):
    """The text is not a program of the language, or its value leaves the allowed range."""


def evaluate(program: str, x: int) -> int:
    """Return the value of a whitespace-separated program at `x`.

    Grammar: sum := product (('+' | '-') product)*; product := atom ('*' atom)*; atom := int | x | '(' sum ')'.

    Raises:
        ExpressionError: on anything else, on more than 64 tokens, and on values beyond one million.
    """
    tokens = program.split()
    if not tokens or len(tokens) > MAX_TOKENS:
        raise ExpressionError(f"a program has 1 to {MAX_TOKENS} tokens, got {len(tokens)}")
    parser = _Parser(tokens, x)
    value = parser.sum()
    if parser.position != len(tokens):
        raise ExpressionError(f"unexpected '{tokens[parser.position]}' in '{program}'")
    return value


class _Parser:
    def __init__(self, tokens: list[str], x: int) -> None:
        self.tokens, self.x, self.position = tokens, x, 0

    def _peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self.position += 1
        return token

    def sum(self) -> int:
        value = self.product()
        while self._peek() in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            value = _bounded(value + sign * self.product())
        return value

    def product(self) -> int:
        value = self.atom()
        while self._peek() == "*":
            self._take()
            value = _bounded(value * self.atom())
        return value

    def atom(self) -> int:
        token = self._take()
        if token == "x":
            return _bounded(self.x)
        if token == "(":
            value = self.sum()
            if self._take() != ")":
                raise ExpressionError("missing ')'")
            return value
        if token.isascii() and token.isdigit() and len(token) <= 6:
            return int(token)
        raise ExpressionError(f"expected a number, x or '(', got '{token}'")


def _bounded(value: int) -> int:
    if abs(value) > MAX_VALUE:
        raise ExpressionError(f"value {value} is out of range")
    return value
