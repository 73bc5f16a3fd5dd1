"""No home folder, or one that takes nothing: commands work all the same, or one line names the variable to set."""

from __future__ import annotations

import os
import pwd
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from starquant.__main__ import main
from starquant.store.cache import is_writable
from starquant.tracking.wandb_worker import start
from tests.support.command_line import process
from tests.support.specs import spec

#: As in a container whose home is nowhere; what says otherwise is empty.
NOWHERE = {"HOME": "/dev/null/x", **dict.fromkeys(("STARQUANT_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), "")}
PYTHON = (sys.executable, "-m")


def test_figures_are_drawn_in_silence_and_the_cache_is_named() -> None:
    drawn = process(*PYTHON, "starquant.reports.figures", "--help", MPLCONFIGDIR="", **NOWHERE)
    assert (drawn.returncode, drawn.stderr) == (0, "")
    built = process(*PYTHON, "starquant.testbed.smol.build", **NOWHERE)
    assert built.returncode == 2
    (line,) = built.stderr.splitlines()
    assert line.startswith("error: /dev/null/x/.cache/starquant/smol/base: cannot be written")
    assert line.endswith("; set STARQUANT_CACHE to a folder that can be written")


def test_wandb_gets_a_home_where_none_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> Any:
        raise KeyError

    run = spec().model_dump(mode="json")
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key != "HOME"})
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert _home(tmp_path, run, monkeypatch) == str(tmp_path)
    os.environ["HOME"] = "/home/of/a/user"
    assert _home(tmp_path, run, monkeypatch) == "/home/of/a/user"


def _home(folder: Path, run: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: os.environ["HOME"]))
    home: str = start(folder, dict(run), "digest", {})
    return home


def test_a_folder_takes_files_if_what_is_there_of_it_does(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert is_writable(tmp_path) and is_writable(tmp_path / "a" / "b")
    assert not is_writable(tmp_path / "file") and not is_writable(tmp_path / "file" / "below")


def test_nowhere_for_temporary_files_is_said_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert main(["run", "model=tiny"]) == 2
    assert capsys.readouterr().err.startswith("error: TMPDIR: ")
