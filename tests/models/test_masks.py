"""Padding changes nothing at the real positions, on either side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starquant.models.base import MaskedDiffusionModel
from tests.support.paths import golden_arrays

LENGTHS = (23, 9, 16, 1)


def sequences(family: str) -> list[Tensor]:
    ids = torch.from_numpy(golden_arrays(family)["input_ids"])
    return [ids[index % len(ids)][:length] for index, length in enumerate(LENGTHS)]


def padded(rows: list[Tensor], side: str, token: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask [B, longest + 2], so that even the longest row has padding."""
    width = max(map(len, rows)) + 2
    ids = torch.full((len(rows), width), token)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where], mask[index, where] = row, 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [501, 7])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padded_batch_equals_one_by_one(
    side: str, pad: int, dtype: torch.dtype, family: str, golden_model: MaskedDiffusionModel
) -> None:
    rows = sequences(family)
    ids, mask = padded(rows, side, pad)
    together = golden_model(ids, attention_mask=mask.to(dtype)).logits
    for index, row in enumerate(rows):
        alone = golden_model(row[None]).logits[0]
        torch.testing.assert_close(together[index][mask[index].bool()], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_in_the_middle_takes_no_position(family: str, golden_model: MaskedDiffusionModel) -> None:
    row = sequences(family)[2]
    mask = torch.tensor([[1] * 5 + [0] * 7 + [1] * (len(row) - 5)])
    ids = torch.full_like(mask, 501)
    ids[mask.bool()] = row
    logits = golden_model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits, golden_model(row[None]).logits[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_the_mask_padding_would_matter(family: str, golden_model: MaskedDiffusionModel) -> None:
    rows = sequences(family)
    ids, mask = padded(rows, "right", 501)
    alone = golden_model(rows[1][None]).logits[0]
    assert (golden_model(ids).logits[1][mask[1].bool()] - alone).abs().max() > 0.1


@torch.no_grad()
def test_a_row_of_padding_leaves_the_others_alone(family: str, golden_model: MaskedDiffusionModel) -> None:
    row = sequences(family)[0]
    mask = torch.stack([torch.ones_like(row), torch.zeros_like(row)])
    logits = golden_model(row.repeat(2, 1), attention_mask=mask).logits
    torch.testing.assert_close(logits[0], golden_model(row[None]).logits[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_all_ones_mask_is_no_mask(family: str, golden_model: MaskedDiffusionModel) -> None:
    ids = torch.from_numpy(golden_arrays(family)["input_ids"])
    assert torch.equal(golden_model(ids, attention_mask=torch.ones_like(ids)).logits, golden_model(ids).logits)


@torch.no_grad()
def test_given_position_ids_are_used(family: str, golden_model: MaskedDiffusionModel) -> None:
    ids = torch.from_numpy(golden_arrays(family)["input_ids"])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    plain = golden_model(ids).logits
    assert torch.equal(golden_model(ids, position_ids=positions).logits, plain)
    assert (golden_model(ids, position_ids=positions * 3).logits - plain).abs().max() > 0.1
    shifted = golden_model(ids, position_ids=positions + 40).logits  # only differences of positions count
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2,), (1, 6), (2, 5), (2, 7), (3, 6), (2, 1, 6), (2, 1, 6, 6)])
def test_mask_of_another_shape_is_refused(
    shape: tuple[int, ...], family: str, golden_model: MaskedDiffusionModel
) -> None:
    with pytest.raises(ValueError, match="attention_mask must have the shape of input_ids"):
        golden_model(torch.ones(2, 6, dtype=torch.long), attention_mask=torch.ones(shape))
