"""What runs inside the sandbox: a program in one process, its tests in another, plain values between the two.

The program never meets what judges it. Its process holds neither the tests nor the verdict nor any object of theirs; it
is sent a function's name and arguments, and sends back a value, which is built anew from plain parts on the other side.
So nothing that a program changes in its own interpreter (frames, builtins, exit handlers) reaches the verdict.

Started in an isolated interpreter without this package but for `values.py` and `calls.py` (`starting.CODE`).
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from starquant.evaluation.sandbox.calls import refuse_calls
from starquant.evaluation.sandbox.values import Ended, decode, encode

MOST_BYTES = 8 << 20  # of one message
PR_SET_DUMPABLE = 4
#: What a raised exception may not become on the other side: they would end a loop there, not fail it.
SILENT = (StopIteration, StopAsyncIteration)


class Link:
    """JSON lines over the descriptor of a socket."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = b""

    def send(self, message: Any) -> None:
        """Send one message; raises Ended where nobody listens."""
        left = json.dumps(message).encode() + b"\n"
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            raise Ended("ended early") from None

    def receive(self) -> Any:
        """Return the next message; raises Ended where none comes, or one that is no message."""
        while b"\n" not in self._buffer:
            try:
                new = os.read(self._descriptor, 1 << 16)
            except OSError:
                new = b""
            self._buffer += new
            if not new or len(self._buffer) > MOST_BYTES:
                raise Ended("returned too much" if new else "ended early")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise Ended("sent what is no message") from None


def run_program(link: Link) -> None:
    """Run the program that comes over the link, then answer what its functions are asked until the link closes."""
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(link.receive(), "program", "exec"), names)  # the purpose of this process
    except BaseException as error:
        return link.send({"failed": describe(error)})
    link.send({"ready": True})
    while True:
        name, call = link.receive()
        try:
            value = names[name] if call is None else names[name](*decode(call[0]), **decode(call[1]))
            if call is None and callable(value):
                answer: dict[str, Any] = {"function": True}
            elif call is None and type(value) is type(sys):
                answer = {"module": True}
            else:
                answer = {"value": encode(value)}
        except BaseException as error:
            answer = {"raised": [kind.__name__ for kind in type(error).__mro__], "why": describe(error)}
        link.send(answer)


def describe(error: BaseException) -> str:
    """Return an error in one line, as the last line of a traceback has it."""
    if isinstance(error, SystemExit):
        return f"ended early with code {error.code}"
    try:
        lines = str(error).splitlines() or [""]
    except Exception:
        lines = [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")[:200]


class Names(dict):  # type: ignore[type-arg]
    """The names that tests see: their own, Python's, then those of the program, which are reached over the link."""

    def __init__(self, link: Link, functions: tuple[str, ...], **own: Any) -> None:
        super().__init__(own)
        self._link = link
        for name in functions:
            self[name] = self._function(name)

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or hasattr(builtins, name):
            raise KeyError(name)
        answer = self._ask(name, None)
        if answer.get("module") and name in sys.stdlib_module_names:
            self[name] = importlib.import_module(name)
        elif answer.get("function"):
            self[name] = self._function(name)
        else:
            self[name] = decode(answer.get("value"))
        return self[name]

    def _function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            return decode(self._ask(name, [encode(arguments), encode(named)]).get("value"))

        call.__name__ = call.__qualname__ = name
        return call

    def _ask(self, name: str, call: Any) -> dict[str, Any]:
        self._link.send([name, call])
        answer = self._link.receive()
        if not isinstance(answer, dict):
            raise Ended("sent what is no message")
        if "raised" not in answer:
            return answer
        why = str(answer.get("why"))
        if call is None:
            raise KeyError(name)
        for kind in map(str, answer["raised"] if isinstance(answer["raised"], list) else ()):
            known = getattr(builtins, kind, None)
            if isinstance(known, type) and issubclass(known, Exception) and not issubclass(known, SILENT):
                try:
                    error = known(why.partition(": ")[2])
                except TypeError:  # it is made of more than a message
                    error = RuntimeError(why)
                raise error
        raise Ended(why)


def run_tests(link: Link, program: str, prompt: str, tests: str) -> None:
    """Run the tests to their end; the program passes if nothing is raised.

    What the prompt defines is the tests' own, but for its last function: the one that the program completes.
    """
    link.send(program)
    answer = link.receive()
    if not isinstance(answer, dict) or answer.get("ready") is not True:
        raise Ended(str(answer.get("failed") if isinstance(answer, dict) else answer))
    own, functions = _prompt(prompt)
    names = Names(link, functions, __name__="__main__")
    if own is not None:
        exec(own, names)
        names |= {name: names._function(name) for name in functions}
    exec(compile(tests, "tests", "exec"), names)


def _prompt(prompt: str) -> tuple[Any, tuple[str, ...]]:
    """Return the code of a prompt and the name that it defines last; nothing for a prompt that is no Python."""
    import ast

    for text in (prompt, f"{prompt}\n    pass\n"):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        return compile(tree, "prompt", "exec"), tuple(functions[-1:])
    return None, ()


def limit(seconds: int, memory_mb: int, file_mb: int, open_files: int, processes: int) -> None:
    """Limit this process and those that it starts."""
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, file_mb << 20),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 1),  # no core; 0 would still send one to a pipe, as `kernel.core_pattern` may name
    ):
        ceiling = resource.getrlimit(kind)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(kind, (value, value))


def hide() -> None:
    """Keep this process from being traced and read by others of the same user; matters where walls do not."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def main() -> None:
    """Arguments: "program" or "tests", descriptor of the link, then the numbers of `limit`.

    Tests read {program, prompt, tests} from standard input and write {passed, reason} to its output.
    """
    role, link = sys.argv[1], Link(int(sys.argv[2]))
    limit(*map(int, sys.argv[3:]))
    refuse_calls()
    del sys.argv[1:]
    if role == "program":
        with contextlib.suppress(Ended):
            run_program(link)
        os._exit(0)
    hide()
    job, verdict = json.load(sys.stdin), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what tests print is not their verdict
    passed, reason = False, "passed"
    try:
        run_tests(link, **job)
        passed = True
    except BaseException as error:
        reason = str(error) if isinstance(error, Ended) else describe(error)
    os.write(verdict, json.dumps({"passed": passed, "reason": " ".join(reason.split())[:200] or "failed"}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
