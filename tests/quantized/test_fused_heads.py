"""Queries and keys in one pass: where it stands, and that a CPU computes what it did (kernels: tests/kernels)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from starquant.models.base import MaskedDiffusionModel
from starquant.models.layers import Heads
from starquant.packed.description import use_integers
from starquant.quantized.fused_heads import FusedHeads
from tests.support.models import llada_gqa, logits, sdar


@pytest.mark.parametrize("make", [llada_gqa, sdar])
def test_it_stands_where_integers_may_be_used(make: Callable[[], MaskedDiffusionModel]) -> None:
    model = make()
    ids = torch.arange(24)[None] % 100
    before = logits(model, ids)
    for where, kind in (("on_gpu", FusedHeads), ("never", Heads), ("always", FusedHeads)):
        use_integers(model, where)  # type: ignore[arg-type]
        heads = [model.block_sites(block).attention.heads for block in model.trunk().blocks]
        assert {type(each) for each in heads} == {kind}
        assert torch.equal(logits(model, ids), before)


def test_heads_are_split_normalised_and_turned() -> None:
    """Two positions by hand: the halves of a head are the coordinates of its rotations."""
    q = torch.tensor([[[1.0, 0.0, 0.0, 2.0], [1.0, 3.0, 0.0, 0.0]]])
    angle = torch.tensor([[0.0, 0.0], [torch.pi / 2, 0.0]])
    cos, sin = (f(torch.cat((angle, angle), -1))[None, None] for f in (torch.cos, torch.sin))
    turned, _ = Heads()(q, q, 4, (cos, sin))
    expected = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 3.0, 1.0, 0.0]])
    torch.testing.assert_close(turned[0, 0], expected, rtol=0, atol=1e-6)
