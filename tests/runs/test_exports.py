"""Exports of runs to one target: one at a time, and what lies there is compared with what was written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from starquant.runs import export as exports
from starquant.runs.execute import execute
from tests.support.specs import spec

SMALL = ("model=tiny", "tasks.names=[testbed_facts]", "tasks.limit=2", "fidelity=none", "runtime.threads=1")


def run(results: Path, target: Path, *overrides: str) -> Any:
    return execute(spec(*SMALL, f"paths.results={results}", f"export.dir={target}", *overrides))


def test_a_run_takes_what_one_of_another_results_folder_exported_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target, stamps, real = tmp_path / "packed", [], exports.alone_at

    @contextmanager
    def waited(path: Path) -> Iterator[None]:
        monkeypatch.setattr(exports, "alone_at", real)
        run(tmp_path / "first", path, "method=rtn")
        stamps.append((path / "config.json").stat().st_mtime_ns)
        with real(path):
            yield

    monkeypatch.setattr(exports, "alone_at", waited)
    run(tmp_path / "second", target, "method=rtn")
    assert stamps == [(target / "config.json").stat().st_mtime_ns]
    assert f"exported already: {target}" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "packed", "second"]
