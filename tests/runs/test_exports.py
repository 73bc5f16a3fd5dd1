"""Exports of runs to one target: one at a time, and what lies there is compared with what was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from starquant.errors import ConfigError
from starquant.runs import export as exports
from starquant.runs.execute import execute
from starquant.store.exports import LISTING
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A results folder, and a GGUF of it at full precision."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("exported")
    run(folder / "results", folder / "m.gguf", "method=none", "export.format=gguf")
    return folder / "results", folder / "m.gguf"


def _changed(content: bytes, where: int) -> bytes:
    changed = bytearray(content)
    changed[where] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda content: _changed(content, -1000), "is not what was written"),
        (lambda content: _changed(content, content.index(b"general.name") + 25), "is not what was written"),
        (lambda content: content + b"x", "is not what was written"),
        (lambda content: content[: len(content) // 2], "is no whole GGUF, but cut or another file: .*"),
        (lambda content: b"a text", "is no whole GGUF, but cut or another file: .*"),
        (lambda content: b"", "is no whole GGUF, but cut or another file: .*"),
    ],
    ids=["tensor", "name", "longer", "cut", "text", "empty"],
)
def test_a_gguf_that_is_not_what_was_written_is_no_export(
    damage: Callable[[bytes], bytes], why: str, exported: tuple[Path, Path], tmp_path: Path
) -> None:
    results, whole = exported
    copy = tmp_path / "m.gguf"
    copy.write_bytes(whole.read_bytes())
    assert run(results, copy, "method=none", "export.format=gguf").reused
    copy.write_bytes(damage(whole.read_bytes()))
    with pytest.raises(ConfigError, match=rf"^export\.dir: .*m\.gguf: {why}; remove it to export again, or name a new"):
        run(results, copy, "method=none", "export.format=gguf")


def test_a_gguf_of_earlier_code_holds_no_digest(exported: tuple[Path, Path], tmp_path: Path) -> None:
    results, whole = exported
    copy = tmp_path / "m.gguf"
    copy.write_bytes(whole.read_bytes().replace(b"starquant.sha256", b"starquant.sha999", 1))
    assert run(results, copy, "method=none", "export.format=gguf").reused


def test_another_type_of_numbers_is_not_what_lies_there(exported: tuple[Path, Path], tmp_path: Path) -> None:
    results, whole = exported
    with pytest.raises(
        ConfigError,
        match=r"^export\.dtype: got float32, but .*gguf was exported with export\.dtype=float16; allowed",
    ):
        run(results, whole, "method=none", "export.format=gguf", "export.dtype=float32")
    everything = ("bits=q4_0", "method=rtn", "export.format=gguf")  # is quantized: no number is of that type
    run(results, tmp_path / "m.gguf", *everything)
    assert run(results, tmp_path / "m.gguf", *everything, "export.dtype=float32").reused


def test_another_size_of_files_is_not_what_lies_there(tmp_path: Path) -> None:
    results, target = tmp_path / "results", tmp_path / "packed"
    run(results, target, "method=rtn", "export.shard_size=100KB")
    with pytest.raises(
        ConfigError, match=r"^export\.shard_size: got 1GB, but .*packed was exported with export\.shard_size=100KB; "
    ):
        run(results, target, "method=rtn")
    assert run(results, target, "method=rtn", "export.shard_size=100KB").reused
    (target / LISTING).unlink()
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]["made_by"]["shard_size"]  # as earlier code wrote it
    (target / "config.json").write_text(json.dumps(config))
    assert run(results, target, "method=rtn").reused
