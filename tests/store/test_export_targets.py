"""Two exports to one target: one at a time, and nothing is left beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from starquant.errors import ConfigError
from starquant.store.exports import alone_at, unfinished
from tests.support.processes import end, start

HOLD = """
import sys
from pathlib import Path
from starquant.session.logs import on_terminal
from starquant.store.exports import unfinished
with on_terminal(), unfinished(Path(sys.argv[1])) as work:
    (work / "part").write_text("x")
    print("held", flush=True)
    sys.stdin.readline()
    assert (work / "part").exists()
"""


def names(folder: Path) -> list[str]:
    """What lies in a folder, work folders without their ending."""
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


def test_the_second_waits_and_leaves_what_the_first_writes(tmp_path: Path) -> None:
    first = start(HOLD, tmp_path / "m")
    assert first.stdout.readline() == "held\n"
    (tmp_path / "link").symlink_to(tmp_path)
    second = start(HOLD, tmp_path / "link" / "m")  # the same target by another path
    assert second.stderr.readline() == f"waiting: another process is at the export to {tmp_path}/link/m\n"
    assert names(tmp_path) == [".m.export", ".m.unfinished", "link"]
    end(first)
    assert first.returncode == 0
    assert second.stdout.readline() == "held\n"
    assert names(tmp_path) == [".m.export", ".m.unfinished", "link"]
    end(second)
    assert second.returncode == 0
    assert names(tmp_path) == ["link"]


def test_what_a_killed_one_left_is_removed_with_its_lock(tmp_path: Path) -> None:
    killed = start(HOLD, tmp_path / "m")
    assert killed.stdout.readline() == "held\n"
    killed.kill()
    killed.communicate()
    assert names(tmp_path) == [".m.export", ".m.unfinished"]
    with unfinished(tmp_path / "m") as work:
        assert [path for path in tmp_path.glob(".m.unfinished-*")] == [work]
    assert names(tmp_path) == []


def test_who_holds_a_target_may_hold_it_again(tmp_path: Path) -> None:
    with alone_at(tmp_path / "m"):
        with unfinished(tmp_path / "m"):
            pass
        assert names(tmp_path) == [".m.export"]
    assert names(tmp_path) == []


def test_a_folder_that_is_not_there_is_named_and_not_made(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"^export\.dir: .*/no/m: cannot be written: No such file"),
        alone_at(tmp_path / "no" / "m"),
    ):
        pass
    assert names(tmp_path) == []
