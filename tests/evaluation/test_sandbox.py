"""Programs in the sandbox: good ones pass, bad ones fail, and nothing of them reaches the caller."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
import time
from pathlib import Path

import pytest

from starquant.evaluation.sandbox import starting
from starquant.evaluation.sandbox.programs import run_program
from starquant.evaluation.sandbox.protection import protection
from starquant.evaluation.sandbox.starting import Limits

QUICK = Limits(seconds=1)
TESTS = "assert f(20) == 22\nassert f(1) == 3"

FAILING = {
    "wrong answer": "def f(x): return x",
    "no function": "x = 1",
    "exception": "raise ValueError('no')",
    "exit": "def f(x): return x + 2\nexit(0)",
    "os._exit": "import os\ndef f(x): os._exit(0)",
    "SystemExit in the function": "def f(x): raise SystemExit(0)",
    "syntax error": "def f(:\n    pass",
    "null byte": "x = 'a\0b'",
    "recursion bomb": "def f(x): return f(x)",
    "killed by itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "waits for input": "def f(x): return int(input())",
    "infinite loop": "def f(x):\n    while True: pass",
    "ignores SIGTERM and loops": "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
    "memory bomb": "hoard = []\nwhile True: hoard.append(bytearray(10**8))",
    "big file": "open('big', 'wb').write(b'x' * (4 << 20))\ndef f(x): return x + 2",
    "endless output": "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x):\n    return helper(x)\ndef helper(x):\n    return x + 2", TESTS),
        ("", ""),
        ("print('x' * 100_000)\ndef f(x):\n    print('y')\n    return x + 2", TESTS),
        ("if __name__ != '__main__':\n    raise ImportError\ndef f(x): return x + 2", TESTS),
        ("assert 'größe' == 'gr\\u00f6\\u00dfe'\ndef f(x): return x", "assert f('größe\\ud800') == 'größe\\ud800'"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nf = 2 .__add__", TESTS),
        ("import os, shutil\nshutil.rmtree(os.getcwd(), True)\ndef f(x): return x + 2", TESTS),
        ("def f(x):\n    raise KeyError(x)", "try:\n    f(1)\n    assert False\nexcept KeyError:\n    pass"),
        ("LIMIT = 3\nimport math\ndef f(): return math.pi", "assert f() == math.pi and LIMIT == 3"),
    ],
)  # fmt: skip
def test_a_correct_program_passes(program: str, tests: str) -> None:
    outcome = run_program(program, tests)
    assert (outcome.passed, outcome.reason) == (True, "passed")


def test_values_go_there_and_back_unchanged() -> None:
    """What lm-eval's own HumanEval compares in one process is equal here too."""
    program = (
        "from collections import Counter, deque\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
        "def same(*values, **named): return values, named\n"
        "def counted(words): return Counter(words)\n"
        "def exact(): return [Fraction(1, 3), Decimal('0.1')]\n"
        "def steps(n): yield from range(n)\n"
        "def parts(d): return d.keys(), d.values(), range(3), deque([1])\n"
        "def array():\n    import numpy\n    return numpy.float64(0.5), numpy.int64(3), numpy.bool_(True)\n"
    )
    tests = (
        "import collections, decimal, fractions\n"
        "big, deep = 10**5000, [[[()]]]\n"
        "values = (None, True, 0, -1, big, 1.5, -0.0, 1e308, float('inf'), 2j, '', 'a\\n', b'\\xff', bytearray(b'x'))\n"
        "nested = ([1, 'a'], (), {1: [2], 'a': (3,), None: {}}, {1, 2}, frozenset('a'), deep)\n"
        "got, named = same(*values, *nested, key=[1])\n"
        "assert got == values + nested and named == {'key': [1]}\n"
        "assert [type(v) for v in got] == [type(v) for v in values + nested]\n"
        "assert same(float('nan'))[0][0] != 0 and same(True)[0][0] is True and same(None)[0][0] is None\n"
        "assert counted('aab') == {'a': 2, 'b': 1} and list(steps(3)) == [0, 1, 2]\n"
        "assert exact() == [fractions.Fraction(1, 3), decimal.Decimal('0.1')]\n"
        "keys, items, numbers, queue = parts({1: 2})\n"
        "assert keys == {1} and list(items) == [2] and numbers == range(3) and queue == collections.deque([1])\n"
        "assert array() == (0.5, 3, True)\n"
    )
    assert run_program(program, tests).reason == "passed"


@pytest.mark.parametrize("program", FAILING.values(), ids=FAILING.keys())
def test_a_bad_program_fails_and_leaves_nothing(program: str, folders: Path) -> None:
    begun = time.monotonic()
    assert not run_program(program, TESTS, QUICK).passed
    assert time.monotonic() - begun < 10
    assert list(folders.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("def f(x):\n    raise ValueError('no such thing')", "ValueError: no such thing"),
        ("class Own(Exception): pass\ndef f(x):\n    raise Own('why')", "Exception: why"),
        ("def f(x): return x", "AssertionError"),
        ("", "NameError: name 'f' is not defined"),
        ("while True: pass", "timed out"),
        ("exit(3)", "ended early with code 3"),
        ("import os\nos._exit(3)", "ended early"),
        ("x = bytearray(10**11)", "MemoryError"),
        ("def f(x): return f", "TypeError: a value of type function is not plain data"),
    ],
)
def test_the_reason_says_what_happened(program: str, reason: str) -> None:
    assert run_program(program, TESTS, QUICK).reason == reason


@pytest.mark.parametrize(
    ("limits", "small", "large"),
    [
        (Limits(memory_mb=300), "x = bytearray(50 << 20)", "x = bytearray(400 << 20)"),
        (Limits(file_mb=2), "open('f', 'wb').write(b'x' * (1 << 20))", "open('f', 'wb').write(b'x' * (3 << 20))"),
        (
            Limits(open_files=20),
            "files = [open('/dev/null') for _ in range(8)]",
            "files = [open('/dev/null') for _ in range(25)]",
        ),
    ],
    ids=["memory", "file size", "open files"],
)
def test_limits_lie_where_they_are_set(limits: Limits, small: str, large: str) -> None:
    assert run_program(small, "", limits).passed
    assert not run_program(large, "", limits).passed


def test_the_tests_are_limited_too(folders: Path) -> None:
    assert run_program("", "while True: pass", QUICK).reason == "timed out"
    assert not run_program("", "x = bytearray(10**11)", QUICK).passed
    assert not run_program("", "import os\nos._exit(0)", QUICK).passed
    assert list(folders.iterdir()) == []


def test_the_folder_is_the_programs_own(folders: Path) -> None:
    program = "import os\nbefore = os.listdir()\nos.makedirs('a/b')\nopen('a/b/left', 'w').write('x')"
    assert run_program(program, "assert before == []").passed
    assert list(folders.iterdir()) == []


def test_the_callers_environment_is_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("")
    monkeypatch.setenv("STARQUANT_SECRET", "hunter2")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = {"PATH", "PWD", "OLDPWD", "LC_ALL", "LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    assert run_program("import os\nnames = set(os.environ)", f"assert names <= {names}").passed
    assert "ModuleNotFoundError" in run_program("import planted", "").reason


def test_a_killed_caller_leaves_nothing_for_long(tmp_path: Path) -> None:
    """`timeout` ends namespaces whose caller is no more; without them a limit on CPU time is all there is."""
    walls = protection().walls
    command = walls.command(["python"], tmp_path, 1, seconds=7.5)
    assert walls.name != "namespaces" or command[:3] == ["timeout", "--signal=KILL", "7.5"]


def test_a_forked_child_does_not_outlive_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(starting.ENVIRONMENT, "MARK", mark := secrets.token_hex(16))
    program = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    for number in range(3, 64):\n"
        "        try: os.close(number)\n        except OSError: pass\n    time.sleep(300)\n"
        "def f(x): return os.environ['MARK']"
    )
    assert run_program(program, f"assert f(1) == {mark!r}").passed
    for _ in range(50):
        if not _marked(mark):
            return
        time.sleep(0.1)
    raise AssertionError(_marked(mark))


def _marked(mark: str) -> list[str]:
    """Processes that have a mark in their environment."""
    marked = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                marked.append(path.parent.name)
    return marked
