"""Hidden states in mapped files are those in memory, whatever blocks are fed; the files go with the walk."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from starquant.calibration import held_states
from starquant.calibration.held_states import HeldStates
from starquant.calibration.site_statistics import Collect
from starquant.calibration.walk import Pair, walk
from starquant.errors import DataError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.blocks_on_disk import hollow_model
from starquant.models.loading import validate_checkpoint
from starquant.models.roles import Site
from starquant.quantized.install import quantize_block, round_to_nearest
from tests.support.models import fresh
from tests.support.specs import FOUR_BITS
from tests.support.states import partly_masked


def seen_by(model: MaskedDiffusionModel, inputs: str, watch: Path | None = None) -> list[torch.Tensor]:
    """What a visitor sees of every site and of the exact block beside the quantized one."""
    seen: list[torch.Tensor] = []

    def keep(pair: Pair) -> None:
        seen.extend((pair.exact_BLD, pair.quantized_BLD))

    for visit in walk(model, partly_masked(model, inputs=inputs)):
        visit.keep_exact()
        statistics = visit.collect(Collect(moments=False, second_moment="pooled"))
        seen += [statistics[site].second_moment().mean for site in Site]
        visit.side_by_side(visit.block, Site.OUT, keep)
        if visit.feeds_quantized:
            quantize_block(model, visit.block, visit.index, FOUR_BITS, round_to_nearest)
        if watch is not None:
            assert list(watch.glob("hidden-*/hidden-*"))
    return [tensor.clone() for tensor in seen]


@pytest.mark.parametrize("inputs", ["full_precision", "quantized"])
@pytest.mark.parametrize("architecture", ["llada_gqa", "dream_gqa"])
def test_a_walk_over_files_is_a_walk_over_memory(architecture: str, inputs: str, tmp_path: Path) -> None:
    resident = fresh(architecture)
    resident.save_pretrained(tmp_path / "model")
    checkpoint, family = validate_checkpoint(tmp_path / "model")
    changed = tmp_path / "changed"
    hollow = hollow_model(checkpoint, family.model, resident.dtype, torch.device("cpu"), changed)
    ours, theirs = seen_by(hollow, inputs, changed), seen_by(resident, inputs)
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not list(changed.iterdir())
    with pytest.raises(ZeroDivisionError):
        for _ in walk(hollow, partly_masked(hollow)):
            raise ZeroDivisionError
    assert not list(changed.iterdir())


def test_what_is_held_is_a_copy_in_a_file(tmp_path: Path) -> None:
    held, states = HeldStates(tmp_path), torch.randn(2, 3, 4).bfloat16()
    first = held.hold("a", states)
    assert torch.equal(first, states)
    assert first.data_ptr() != states.data_ptr()
    again = held.hold("a", states + 1)
    assert again.data_ptr() == first.data_ptr()
    held.drop()
    assert not list(tmp_path.iterdir())
    memory = HeldStates(None)
    assert memory.hold("a", states) is states


class Room(NamedTuple):
    free: int


def test_a_full_disk_and_a_file_in_the_way_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldStates(tmp_path)
    monkeypatch.setattr(held_states.shutil, "disk_usage", lambda _: Room(10))
    with pytest.raises(DataError, match="hidden states need 48 bytes more than the disk has"):
        held.hold("a", torch.zeros(12))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: cannot be written"):
        HeldStates(tmp_path / "file")
