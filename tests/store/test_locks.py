"""Locks between processes: one at a time, the other says what it waits for, a killed holder frees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from starquant.errors import RecordError
from starquant.store.locks import exclusive, is_held
from tests.support.processes import start

HOLD = """
import sys
from pathlib import Path
from starquant.session.logs import on_terminal
from starquant.store.locks import exclusive
with on_terminal(), exclusive(Path(sys.argv[1]), "cell a"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_second_waits_says_for_what_and_follows_a_killed_first(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a.lock"
    assert not is_held(path)
    first = start(HOLD, path)
    assert first.stdout.readline() == "held\n"
    assert is_held(path)
    second = start(HOLD, path)
    assert second.stderr.readline() == "waiting: another process is at cell a\n"
    assert second.poll() is None
    first.kill()
    first.wait()
    assert second.stdout.readline() == "held\n"
    assert is_held(path)
    out, err = second.communicate("\n", timeout=30)
    assert (second.returncode, out, err) == (0, "", "")  # said once
    assert not is_held(path)
    first.communicate()


def test_nobody_waits_for_a_free_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.lock"
    for _ in range(2):
        with exclusive(path, "cell a"):
            assert is_held(path)
        assert not is_held(path)
    assert capsys.readouterr().err == ""


def test_an_error_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), exclusive(tmp_path / "a.lock", "cell a"):
        raise ValueError("inside")
    assert not is_held(tmp_path / "a.lock")


def test_asking_leaves_no_file(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "a.lock")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("a file")
    path = tmp_path / "locks" / "a.lock"
    with pytest.raises(RecordError, match=rf"{path}: cannot be locked: "), exclusive(path, "cell a"):
        pass
