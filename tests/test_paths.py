"""Paths, homes and terminals as they are found: one line or a success, whatever they are."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from starquant import __main__ as commands
from starquant.errors import CheckpointError, ConfigError, StarquantError, expand_home, show_error
from starquant.models.loading import resolve_folder
from starquant.packed.completion import main as generate
from starquant.reports.__main__ import main as tables
from starquant.runs.preflight import validate_paths
from starquant.store.cache import cache_folder
from tests.support.specs import spec

LONG = "/tmp/" + "x" * 300
KEYS = ("tasks.data_dir", "paths.results", "export.dir", "model.path", "+calibration.source.path")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("path", [LONG, "/tmp/" + "x/" * 3000])
def test_a_path_that_is_none_is_one_line(key: str, path: str) -> None:
    more = {"model.path": ("model.seed=null",), "+calibration.source.path": ("calibration=text",)}.get(key, ())
    with pytest.raises(
        ConfigError, match=rf"^{key.lstrip('+')}: /tmp/x.*: no usable path: File name too long$"
    ) as caught:
        validate_paths(spec(f"{key}={path}", *more))
    assert len(str(caught.value)) < 400


def test_links_in_a_circle_are_no_path(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(StarquantError, match=r"^tasks\.data_dir: .*/a: no such folder$"):
        validate_paths(spec(f"tasks.data_dir={tmp_path}/a"))


@pytest.mark.parametrize("name", [LONG, "~no_such_user_here", "a\0b", ""])
def test_a_checkpoint_that_no_path_can_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError):
        resolve_folder(name)
    assert generate([name, "a prompt"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_home_is_expanded_for_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/x") == f"{tmp_path}/x"
    (tmp_path / "folder").mkdir()
    assert resolve_folder("~/folder") == tmp_path / "folder"
    assert tables(["table1_main", "--records", "~no_such_user_here"]) == 2


def test_the_records_of_a_table_are_looked_for_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tables(["table1_main", "--records=~/here"]) == 2
    assert f"{tmp_path}/here" in capsys.readouterr().err


def test_without_a_home_smol_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("STARQUANT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(ConfigError, match=r"^STARQUANT_CACHE: not set, and no home folder is known; set it to"):
        cache_folder()


def test_a_deleted_working_folder_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    for words in (["method=rtn"], ["status", "table1_main"], ["tables", "table1_main"]):
        assert commands.main(words) == 2
    assert set(capsys.readouterr().err.splitlines()) == {
        "error: the folder that this command runs in is gone; cd to one that is there"
    }


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_lacks_a_character_shows_its_escape(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding=encoding))
    assert commands.main([]) == 0
    print("± 漢 \udcff")
    show_error(ConfigError("paths.results: /tmp/größe: 漢"))
    sys.stdout.flush()
    assert b"error: paths.results: /tmp/gr" in written.getvalue()
    assert ("漢".encode() in written.getvalue()) == (encoding == "utf-8")


def test_a_device_that_is_none_is_named_as_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(["tiny", "a prompt", "--device", "tpu9"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --device: 'tpu9' cannot be used here: ") and said.count("\n") == 1
