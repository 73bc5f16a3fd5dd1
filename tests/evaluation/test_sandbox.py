"""Programs in the sandbox: good ones pass, bad ones fail, and nothing of them reaches the caller."""

from __future__ import annotations

import fcntl
import os
import resource
import tempfile
import time
from pathlib import Path

import pytest

from starquant.evaluation.sandbox import Limits, run_program

QUICK = Limits(seconds=1)

FAILING = {
    "wrong answer": "assert sorted([2, 1]) == [2, 1]",
    "exception": "raise ValueError('no')",
    "exit": "exit(0)\nassert False",
    "os._exit": "import os\nos._exit(0)",
    "SystemExit": "raise SystemExit",
    "SystemExit(0) in a function": "def f():\n    raise SystemExit(0)\nf()",
    "says passed": "print('passed')\nraise SystemExit(0)",
    "says passed on stderr": "import sys\nprint('passed', file=sys.stderr, flush=True)\nraise SystemExit(0)",
    "syntax error": "def f(:\n    pass",
    "null byte": "x = 'a\0b'",
    "recursion bomb": "def f(): return f()\nf()",
    "killed by itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "waits for input": "input()",
    "infinite loop": "while True: pass",
    "sleeps": "import time\ntime.sleep(60)",
    "ignores SIGTERM and loops": "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
    "memory bomb": "hoard = []\nwhile True: hoard.append(bytearray(10**8))",
    "big file": "open('big', 'wb').write(b'x' * (4 << 20))",
}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "source",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "",
        "print('x' * 100_000)",  # more than a pipe holds
        "import sys\nprint('a warning', file=sys.stderr, flush=True)",
        "if __name__ != '__main__':\n    raise ImportError",
        "def main():\n    return helper()\ndef helper():\n    return 3\nassert main() == 3",
        "assert 'größe' == 'gr\\u00f6\\u00dfe'",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    ],
)
def test_a_correct_program_passes(source: str) -> None:
    outcome = run_program(source)
    assert outcome.passed
    assert outcome.reason == "passed"


@pytest.mark.parametrize("source", FAILING.values(), ids=FAILING.keys())
def test_a_bad_program_fails_and_leaves_nothing(source: str, folders: Path) -> None:
    begun = time.monotonic()
    outcome = run_program(source, QUICK)
    assert not outcome.passed
    assert time.monotonic() - begun < 10
    assert list(folders.iterdir()) == []
    assert run_program("pass").passed  # the caller goes on


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("while True: pass", "timed out"),
        ("exit(3)", "ended early with code 3"),
        ("x = bytearray(10**11)", "MemoryError"),
    ],
)
def test_the_reason_says_what_happened(source: str, reason: str) -> None:
    assert run_program(source, QUICK).reason == reason


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
    assert run_program(small, limits).passed
    assert not run_program(large, limits).passed


def test_the_folder_is_the_programs_own_and_removed(folders: Path) -> None:
    source = (
        f"import os\nassert os.path.dirname(os.path.dirname(os.getcwd())) == {str(folders)!r}\n"
        "assert os.listdir() == []\n"
        "os.makedirs('a/b')\nopen('a/b/left', 'w').write('x')"
    )
    assert run_program(source).passed
    assert list(folders.iterdir()) == []


def test_a_program_may_remove_its_own_folder(folders: Path) -> None:
    assert run_program("import os, shutil\nshutil.rmtree(os.getcwd())").passed
    assert list(folders.iterdir()) == []


def test_the_callers_environment_is_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("")
    monkeypatch.setenv("STARQUANT_SECRET", "hunter2")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_program("import os\nassert set(os.environ) <= {'PATH', 'LC_ALL', 'LC_CTYPE'}, os.environ").passed
    assert "ModuleNotFoundError" in run_program("import planted").reason


def test_a_forked_child_does_not_outlive_the_program(tmp_path: Path) -> None:
    lock = tmp_path / "lock"  # held as long as any process that inherited it lives
    source = (
        f"import fcntl, os, time\nheld = open({str(lock)!r}, 'w')\nfcntl.flock(held, fcntl.LOCK_EX)\n"
        "if os.fork() == 0:\n    time.sleep(300)\n    os._exit(0)\n"
    )
    run_program(source, QUICK)
    assert _is_free(lock)


def test_a_child_that_let_go_of_the_output_is_killed_too(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    source = (
        f"import fcntl, os, time\nheld = open({str(lock)!r}, 'w')\nfcntl.flock(held, fcntl.LOCK_EX)\n"
        "if os.fork() == 0:\n"
        "    for number in range(64):\n"
        "        if number != held.fileno():\n"
        "            try: os.close(number)\n"
        "            except OSError: pass\n"
        "    time.sleep(300)\n    os._exit(0)\n"
    )
    run_program(source, QUICK)
    assert _is_free(lock)


def _is_free(lock: Path) -> bool:
    descriptor = os.open(lock, os.O_RDWR)
    try:
        for _ in range(50):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.1)
        return False
    finally:
        os.close(descriptor)


def test_endless_error_output_is_bounded() -> None:
    """What the program says is kept in a file under the file limit, never collected in memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = run_program("import sys\nwhile True: sys.stderr.write('x' * 10**6)", Limits(seconds=3))
    assert not outcome.passed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_error_output_without_a_newline_does_not_hide_success() -> None:
    assert run_program("import sys\nprint('done', end='', file=sys.stderr, flush=True)").passed
