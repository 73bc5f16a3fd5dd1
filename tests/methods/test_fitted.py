"""What a method learned, in memory and in a folder."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from starquant.errors import RecordError
from starquant.methods.fitted import ENDS, NOTES, Fitted, block_part


def parts() -> dict[str, dict[str, Tensor]]:
    """Every kind of tensor that methods keep; block 2 learned nothing."""
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return {
        ENDS: {"rotation.matrix": square, "rotation.transposed": square.T},  # a view, not contiguous
        block_part(0): {
            "q_proj.codes": torch.randint(0, 16, (4, 8), generator=generator).to(torch.uint8),
            "q_proj.scale": torch.rand(4, 1, generator=generator),
            "v.scale": torch.rand(2, 4, generator=generator).bfloat16(),
        },
        block_part(1): {"scale": torch.rand(8, generator=generator, requires_grad=True)},
        block_part(2): {},
    }


def filled(folder: Path | None = None) -> Fitted:
    fitted = Fitted(folder)
    for name, tensors in parts().items():
        fitted.put(name, tensors)
    fitted.note("damping raised", "block 1", damping=0.1)
    return fitted


def expect_same(fitted: Fitted) -> None:
    wanted = parts()
    assert fitted.parts() == sorted(wanted)
    for name, tensors in wanted.items():
        got = fitted.get(name)
        assert got.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert got[key].dtype == tensor.dtype
            assert torch.equal(got[key], tensor)
            assert not got[key].requires_grad
    assert fitted.notes == [{"what": "damping raised", "where": "block 1", "damping": 0.1}]


def test_memory_and_folder_give_the_same(tmp_path: Path) -> None:
    expect_same(filled())
    expect_same(filled(tmp_path / "deep" / "folder"))


@pytest.mark.parametrize("in_folder", [False, True])
def test_saved_and_loaded(tmp_path: Path, in_folder: bool) -> None:
    fitted = filled(tmp_path / "own" if in_folder else None)
    fitted.save(tmp_path / "saved")
    expect_same(Fitted.load(tmp_path / "saved"))
    expect_same(fitted)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == sorted(
        [NOTES, *(f"{name}.safetensors" for name in parts())]
    )


def test_saved_where_it_lies(tmp_path: Path) -> None:
    filled(tmp_path).save(tmp_path)
    loaded = Fitted.load(tmp_path)
    loaded.save(tmp_path)
    expect_same(Fitted.load(tmp_path))


@pytest.mark.parametrize("name", [NOTES, "unfinished.json"])
def test_a_full_disk_is_a_named_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the lists as of the parts: the list of before stays whole."""
    fitted = filled(tmp_path)
    fitted.save(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match=rf"{tmp_path}/{name}: cannot be written: .*No space left"):
        fitted.save(tmp_path) if name == NOTES else fitted.put("part", {"a": torch.zeros(2)})
    expect_same(Fitted.load(tmp_path))
    assert not list(tmp_path.glob("*.part"))


def test_nothing_learned(tmp_path: Path) -> None:
    for fitted in (Fitted(), Fitted(tmp_path / "own")):
        assert fitted.parts() == []
        assert fitted.get(ENDS) == {}
        fitted.save(tmp_path / "saved")
        loaded = Fitted.load(tmp_path / "saved")
        assert (loaded.parts(), loaded.get(block_part(0)), loaded.notes) == ([], {}, [])


@pytest.mark.parametrize("in_folder", [False, True])
def test_what_is_kept_is_the_callers_no_more(tmp_path: Path, in_folder: bool) -> None:
    fitted = Fitted(tmp_path if in_folder else None)
    scale = torch.ones(3)
    given = {"a": scale, "b": scale, "c": scale[:2]}  # shared memory is no matter
    fitted.put("part", given)
    scale.zero_()
    given.clear()
    fitted.get("part").clear()
    assert {key: value.tolist() for key, value in fitted.get("part").items()} == {
        "a": [1.0] * 3,
        "b": [1.0] * 3,
        "c": [1.0] * 2,
    }


def test_a_part_may_be_put_again(tmp_path: Path) -> None:
    for fitted in (Fitted(), Fitted(tmp_path)):
        fitted.put("part", {"a": torch.zeros(2), "b": torch.zeros(1)})
        fitted.put("part", {"a": torch.ones(3)})
        assert fitted.parts() == ["part"]
        assert {key: value.tolist() for key, value in fitted.get("part").items()} == {"a": [1.0] * 3}


def test_a_folder_keeps_no_tensors_in_memory(tmp_path: Path) -> None:
    def alive(fitted: Fitted) -> list[int]:
        return [
            id(x) for value in vars(fitted).values() for x in gc.get_referents(value) if isinstance(x, dict | Tensor)
        ]

    tensor = torch.rand(1000)
    kept = weakref.ref(tensor)
    fitted = Fitted(tmp_path)
    fitted.put("part", {"a": tensor})
    del tensor
    assert kept() is None
    assert alive(fitted) == []
    assert len(alive_in_memory := alive(_in_memory())) == 1, alive_in_memory
    read = weakref.ref(fitted.get("part")["a"])
    assert read() is None
    fitted.save(tmp_path)
    loaded = Fitted.load(tmp_path)
    loaded.get("part")
    assert alive(loaded) == []


def _in_memory() -> Fitted:
    fitted = Fitted()
    fitted.put("part", {"a": torch.rand(10)})
    return fitted


def test_files_of_another_fit_are_not_read(tmp_path: Path) -> None:
    save_file({"scale": torch.ones(2)}, tmp_path / f"{block_part(7)}.safetensors")
    fitted = filled(tmp_path)
    assert fitted.get(block_part(7)) == {}
    fitted.save(tmp_path)
    expect_same(Fitted.load(tmp_path))


@pytest.mark.parametrize("left", [0, 4, 20, -1], ids=["empty", "no header", "half a header", "last byte gone"])
def test_a_truncated_file_is_named(tmp_path: Path, left: int) -> None:
    filled().save(tmp_path)
    file = tmp_path / f"{block_part(0)}.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    loaded = Fitted.load(tmp_path)
    assert loaded.get(ENDS)
    with pytest.raises(RecordError, match=f"{file.name}: missing or damaged"):
        loaded.get(block_part(0))
    with pytest.raises(RecordError, match=file.name):
        loaded.save(tmp_path / "elsewhere")


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    """An absent part would silently be a block without scales."""
    filled().save(tmp_path)
    (tmp_path / f"{block_part(1)}.safetensors").unlink()
    with pytest.raises(RecordError, match=r"block_001\.safetensors: missing or damaged"):
        Fitted.load(tmp_path).get(block_part(1))


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "3", "{}", '{"notes": []}', '{"parts": []}', '{"notes": 1, "parts": 2}']
)
def test_a_folder_without_a_sound_list_is_refused(tmp_path: Path, text: str | None) -> None:
    """So is one whose fit was interrupted before it was saved."""
    filled(tmp_path)
    if text is not None:
        (tmp_path / NOTES).write_text(text)
    with pytest.raises(RecordError, match=rf"{NOTES}: not readable as a fitted method"):
        Fitted.load(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=rf"absent.{NOTES}: not readable"):
        Fitted.load(tmp_path / "absent")


def test_notes_are_plain_data(tmp_path: Path) -> None:
    filled().save(tmp_path)
    listed = json.loads((tmp_path / NOTES).read_text())
    assert listed["notes"] == [{"what": "damping raised", "where": "block 1", "damping": 0.1}]


def test_blocks_sort_by_depth() -> None:
    names = [block_part(k) for k in range(130)]
    assert sorted(names) == names
