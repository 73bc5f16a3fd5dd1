"""Digests of large files: of every byte, computed once, believed as long as nothing says that the file is another."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from starquant.store import cache
from starquant.store.cache import DIGESTS, content_digest

LONG_AGO = 10**9


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that nothing has touched for a while: the clock of this process is ahead."""
    cache._read_once.cache_clear()
    monkeypatch.setenv("STARQUANT_CACHE", str(tmp_path / "cache"))
    path, now = tmp_path / "weights", time.time
    path.write_bytes(b"0123" * 100)
    monkeypatch.setattr(cache.time, "time", lambda: now() + 60)
    yield path
    cache._read_once.cache_clear()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is read to its end from here on, by a process that has only what is on disk."""
    read: list[Path] = []
    real = cache._read

    def counted(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(cache, "_read", counted)
    return read


def again(path: Path) -> str:
    """The digest as another process finds it."""
    cache._read_once.cache_clear()
    return content_digest(path)


def test_a_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reads(monkeypatch)
    assert content_digest(file) == again(file) == sha256(file)
    assert read == [file]
    link = file.with_name("link")
    link.symlink_to(file)
    assert again(link) == sha256(file)
    assert read == [file]


def test_a_file_of_other_content_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with the size and the time of modification that it had; and one that took its name."""
    content_digest(file)
    was = file.stat()
    time.sleep(0.02)  # beyond the grain of the file system's clock
    file.write_bytes(b"4567" * 100)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    assert again(file) == sha256(file)
    other = file.with_name("other")
    other.write_bytes(b"89ab" * 100)
    other.replace(file)
    assert again(file) == sha256(file)


def test_nothing_is_kept_of_a_file_that_was_just_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("STARQUANT_CACHE", str(file.parent / "cache"))
    read = reads(monkeypatch)
    file.write_bytes(b"new")
    assert content_digest(file) == content_digest(file) == sha256(file)
    os.utime(file, ns=(LONG_AGO, LONG_AGO))  # which tells when it was modified, not when that was said
    assert content_digest(file) == sha256(file)
    assert len(read) == 3
    assert not (file.parent / "cache").exists()


def test_nothing_is_kept_of_a_file_that_changes_meanwhile(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cache._read

    def meanwhile(path: Path) -> str:
        digest = real(path)
        path.write_bytes(b"longer than it was" * 100)
        return digest

    monkeypatch.setattr(cache, "_read", meanwhile)
    content_digest(file)
    monkeypatch.setattr(cache, "_read", real)
    assert again(file) == sha256(file)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"KEY": 3}', '{"KEY": "abc"}', "\0"])
def test_a_damaged_cache_is_made_again(content: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content_digest(file)
    kept = file.parent / "cache" / DIGESTS
    (key,) = json.loads(kept.read_text())
    kept.write_text(content.replace("KEY", key))
    assert again(file) == sha256(file)
    assert json.loads(kept.read_text()) == {key: sha256(file)}


def test_a_cache_that_cannot_be_written_is_no_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "cache").write_text("a file")
    read = reads(monkeypatch)
    assert content_digest(file) == content_digest(file) == sha256(file)
    assert read == [file]  # this process remembers
    monkeypatch.delenv("STARQUANT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert again(file) == sha256(file)
