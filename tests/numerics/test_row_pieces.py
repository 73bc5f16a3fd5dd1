"""Functions of rows in pieces: the same bits as of all rows at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starquant.numerics import PerGroup, PerToken, QuantFormat, by_rows, fake_quantize, row_pieces


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of 16 a piece."""
    monkeypatch.setattr(row_pieces, "PIECE", 3 * 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def counted(x: Tensor, per_row: Tensor | None = None) -> tuple[Tensor, list[int]]:
    sizes: list[int] = []

    def function(rows: Tensor, part: Tensor | None) -> Tensor:
        sizes.append(rows.shape[:-1].numel())
        return 2 * rows if part is None else part * rows

    return by_rows(function, x, per_row), sizes


def test_pieces_are_put_together() -> None:
    x, per_row = torch.randn(2, 5, 16), torch.randn(2, 5, 1)
    y, sizes = counted(x)
    assert torch.equal(y, 2 * x) and sizes == [3, 3, 3, 1]
    assert torch.equal(counted(x, per_row)[0], per_row * x)


@pytest.mark.parametrize(
    "x",
    [torch.randn(5, 16), torch.randn(16), torch.randn(16, 10).T, torch.randn(10, 16, requires_grad=True)],
    ids=["few rows", "one row", "not contiguous", "with a gradient"],
)
def test_what_gains_nothing_is_left_whole(x: Tensor) -> None:
    y, sizes = counted(x)
    assert torch.equal(y, 2 * x) and len(sizes) == 1 and y.requires_grad == x.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [None, 8])
def test_rounding_in_pieces_has_the_same_bits(
    size: int | None, symmetric: bool, clip: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, generator=generator).to(dtype)
    fmt = QuantFormat(4, symmetric, PerToken() if size is None else PerGroup(size))
    ratios = 0.5 + torch.rand(2, 5, *((1,) if size is None else (2, 1)), generator=generator) / 2 if clip else None
    pieces = fake_quantize(x, fmt, clip=ratios)
    monkeypatch.setattr(row_pieces, "PIECE", 2**17)
    assert torch.equal(pieces, fake_quantize(x, fmt, clip=ratios))
