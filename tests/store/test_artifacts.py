"""Calibrations on disk: whole or not there, never read when damaged, one of other code is replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from starquant.errors import RecordError
from starquant.store.artifacts import Artifact, ArtifactStore
from starquant.store.files import set_aside

DIGEST, OTHER = "a" * 16, "b" * 16
CONTENT = {"block_0.safetensors": b"\x00\x01" * 600_000, "notes.json": b"{}"}  # more than one chunk of the hash


def artifact(code: str = "code", digest: str = DIGEST) -> Artifact:
    return Artifact(
        digest=digest,
        identity={"bits": {"name": "w4a4"}},
        code_digest=code,
        calibration={"states": 512},
        seconds={"fit": 1.5},
        provenance={"git_sha": None},
    )


def make(store: ArtifactStore, code: str = "code", content: dict[str, bytes] = CONTENT) -> Artifact:
    """Write a calibration as `calibrating` does."""
    folder = store.unfinished(DIGEST, code)
    folder.mkdir(parents=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return store.finish(folder, artifact(code))


def test_round_trip_and_layout(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    assert store.find(DIGEST) is None
    made = make(store)
    assert store.find(DIGEST) == made == artifact().model_copy(update={"files": made.files})
    assert {name: entry.size for name, entry in made.files.items()} == {n: len(d) for n, d in CONTENT.items()}
    folder = tmp_path / "artifacts" / DIGEST
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "artifact.json"} == CONTENT
    assert json.loads((folder / "artifact.json").read_text())["digest"] == DIGEST
    assert list((tmp_path / "artifacts").iterdir()) == [folder]
    assert not list((tmp_path / "unfinished").iterdir())
    assert store.find(OTHER) is None


def test_what_is_not_finished_is_not_found(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    folder = store.unfinished(DIGEST, "code")
    folder.mkdir(parents=True)
    (folder / "notes.json").write_bytes(b"{}")
    assert store.find(DIGEST) is None
    assert folder != store.unfinished(DIGEST, "other code")


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_digest(path: Path) -> None:
    rewrite(path, DIGEST, OTHER)


def later_version(path: Path) -> None:
    rewrite(path, '"schema_version": 2', '"schema_version": 3')


def unknown_key(path: Path) -> None:
    rewrite(path, '"seconds"', '"hours"')


def edited(path: Path, **values: Any) -> None:
    """Change a header as a text editor would; None takes a key away."""
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}, indent=1) + "\n")


def no_list(path: Path) -> None:
    edited(path, files={})


def no_seal(path: Path) -> None:
    edited(path, seal=None)


def as_version_1(path: Path, **values: Any) -> None:
    edited(path, seal=None, schema_version=1, **values)


def test_one_without_a_seal_is_readable_unless_its_list_is_of_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ArtifactStore(tmp_path)
    made = make(store)
    header = store.path(DIGEST) / "artifact.json"
    as_version_1(header)
    assert store.find(DIGEST) == made.model_copy(update={"schema_version": 1})
    as_version_1(header, files={})
    assert store.find(DIGEST) is None
    assert f"{header.with_name('block_0.safetensors')}: is not of the calibration" in capsys.readouterr().err


def test_one_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    make(store)
    later_version(store.path(DIGEST) / "artifact.json")
    with pytest.raises(RecordError, match="schema_version is 3, this version reads 1 and 2"):
        store.find(DIGEST)
    assert store.path(DIGEST).is_dir()


def test_what_is_damaged_is_left_alone_by_those_who_do_not_hold_the_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ArtifactStore(tmp_path)
    make(store)
    cut(store.path(DIGEST) / "block_0.safetensors")
    assert store.find(DIGEST, alone=False) is None
    assert store.path(DIGEST).is_dir()
    assert store.find(DIGEST) is None
    assert not store.path(DIGEST).exists()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        ("block_0.safetensors", cut, "is not what was written"),
        ("block_0.safetensors", change, "is not what was written"),
        ("block_0.safetensors", Path.unlink, "is missing"),
        ("notes.json", cut, "is not what was written"),
        ("artifact.json", cut, None),
        ("artifact.json", lambda path: path.write_bytes(b"\xff\x00"), "not readable as an artifact"),
        ("artifact.json", Path.unlink, "not readable as an artifact"),
        ("artifact.json", other_digest, f"its digest is {OTHER}, its folder says {DIGEST}"),
        ("artifact.json", unknown_key, "not readable as an artifact"),
        ("artifact.json", no_list, "not what was written: its content is not that of its seal"),
        ("artifact.json", no_seal, "not what was written: its content is not that of its seal"),
        ("artifact.json", lambda path: path.write_text("[]"), "not readable as an artifact"),
        ("more.safetensors", lambda path: path.write_bytes(b"x"), "is not of the calibration"),
    ],
)
def test_what_is_damaged_is_named_and_set_aside(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: Callable[[Path], object],
    problem: str | None,
) -> None:
    store = ArtifactStore(tmp_path)
    if problem is None:  # only the last line feed is lost: nothing is damaged
        made = make(store)
        damage(store.path(DIGEST) / file)
        assert store.find(DIGEST) == made
        return
    for suffix in ("", ".1"):  # what was set aside before stays
        make(store, content={name: data[:10] for name, data in CONTENT.items()})
        path = store.path(DIGEST) / file
        damage(path)
        left = {file.name: file.read_bytes() for file in path.parent.iterdir()}
        assert store.find(DIGEST) is None
        message = capsys.readouterr().err
        assert message.startswith(f"warning: {path}: ")
        assert problem in message
        aside = tmp_path / "artifacts" / f"{DIGEST}.damaged{suffix}"
        assert f"set aside as {aside.name} and computed again" in message
        assert {file.name: file.read_bytes() for file in aside.iterdir()} == left
        assert not store.path(DIGEST).exists()


def test_damage_is_found_beyond_the_first_chunk(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    make(store)
    path = store.path(DIGEST) / "block_0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert store.find(DIGEST) is None


def test_a_header_that_breaks_off_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ArtifactStore(tmp_path)
    make(store)
    header = store.path(DIGEST) / "artifact.json"
    header.write_text(header.read_text()[: header.stat().st_size // 2])
    assert store.find(DIGEST) is None
    assert f"warning: {header}: not readable as an artifact" in capsys.readouterr().err


def test_a_file_in_its_place_is_set_aside(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.folder.mkdir()
    store.path(DIGEST).write_text("mine")
    assert store.find(DIGEST) is None
    assert (tmp_path / "artifacts" / f"{DIGEST}.damaged").read_text() == "mine"
    assert make(store) == store.find(DIGEST)


def test_one_of_other_code_is_replaced(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    make(store, "old", {"old.safetensors": b"old"})
    store.unfinished(DIGEST, "older").mkdir(parents=True)
    new = make(store, "new", {"new.safetensors": b"new"})
    assert store.find(DIGEST) == new
    assert new.code_digest == "new"
    assert sorted(path.name for path in store.path(DIGEST).iterdir()) == ["artifact.json", "new.safetensors"]
    assert not list((tmp_path / "unfinished").iterdir())


def test_a_header_of_before_does_not_count_as_a_file(tmp_path: Path) -> None:
    made = make(ArtifactStore(tmp_path), content=CONTENT | {"artifact.json": b"of a run that was killed here"})
    assert sorted(made.files) == sorted(CONTENT)
    assert ArtifactStore(tmp_path).find(DIGEST) == made


def test_what_a_killed_process_left_half_written_does_not_count_as_a_file(tmp_path: Path) -> None:
    made = make(ArtifactStore(tmp_path), content=CONTENT | {".unfinished.json.x1.part": b"half"})
    assert sorted(made.files) == sorted(CONTENT)
    assert ArtifactStore(tmp_path).find(DIGEST) == made


def test_a_full_disk_is_a_named_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = ArtifactStore(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RecordError, match=rf"{tmp_path}/artifacts/{DIGEST}: cannot be written: .*No space left"):
            make(store)
    assert not list((tmp_path / "artifacts").glob("*"))
    made = store.unfinished(DIGEST, "code")
    assert sorted(path.name for path in made.iterdir()) == sorted(CONTENT)  # no half-written header
    assert store.finish(made, artifact()) == store.find(DIGEST)  # goes on once there is space


def test_a_full_disk_leaves_the_calibration_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = ArtifactStore(tmp_path)
    before = make(store, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError):
        make(store, "new")
    assert store.find(DIGEST) == before


def test_setting_aside_keeps_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    for number in range(3):
        path.write_text(str(number))
        set_aside(path, f"{path}: broken")
    names = ["a.json.damaged", "a.json.damaged.1", "a.json.damaged.2"]
    assert [(tmp_path / name).read_text() for name in names] == ["0", "1", "2"]
    assert len(list(tmp_path.iterdir())) == 3
    assert capsys.readouterr().err.count(f"warning: {path}: broken; set aside as ") == 3
