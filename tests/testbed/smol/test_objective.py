"""The loss of a batch is the slow one, and masks fall where they should."""

from __future__ import annotations

import math

import pytest
import torch

from starquant.testbed.smol.training import objective
from starquant.testbed.smol.training.network import Dimensions, Network
from starquant.testbed.smol.training.objective import Batch, cross_entropy, draw_masks, weighted_mean
from starquant.testbed.smol.training.packing import Mark, Rows, Segment, pack
from tests.support import smol


def packed_rows(count: int = 4) -> Rows:
    """Rows of natural segments of 32 and task segments of 16 tokens of prompt, 5 of answer and 11 of end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, smol.VOCABULARY, (count * 8 - 1, 32), generator=generator).tolist()
    return pack([Segment(one, (16, 21) if number % 2 else None) for number, one in enumerate(ids)], count)


def draw(seed: int, rows: Rows) -> Batch:
    return draw_masks(rows, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_the_slow_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "PREDICTED", 1.0)  # so that no masked position is left out
    base = smol.random_base()
    network = Network(base, Dimensions.of(base, smol.HEAD_DIM), 4, torch.float32, 0)
    rows = packed_rows()
    batch = draw(seed, rows)
    with torch.no_grad():
        loss = weighted_mean(cross_entropy(network, batch), batch.weight_N).item()
        hidden = network(batch.ids_BL, batch.position_BL, batch.segment_BL, batch.masked_BL)
        logits = network.logits(hidden).double()
    total = weights = 0.0
    for row in range(len(rows)):
        for number in range(1, 9):
            places = [i for i in range(256) if batch.segment_BL[row, i] == number]
            masked = [i for i in places if batch.masked_BL[row, i]]
            outside = [i for i in masked if rows.mark_BL[row, i] == Mark.TEXT]
            task = any(rows.mark_BL[row, i] for i in places)
            # Which segments are masked in the answer only is seen where the prompt is untouched.
            maskable = 16 if task and not outside else 31
            for i in masked:
                weight = math.sqrt(maskable) / len(masked) * (0.25 if rows.mark_BL[row, i] == Mark.END else 1)
                total += weight * float(logits[row, i - 1].logsumexp(0) - logits[row, i - 1, batch.ids_BL[row, i]])
                weights += weight
    assert loss == pytest.approx(total / weights, rel=1e-5)


def test_masks_fall_only_where_something_predicts() -> None:
    rows = packed_rows()
    masked, drawn = torch.zeros(4, 256), 300
    for seed in range(drawn):
        masked += draw(seed, rows).masked_BL
    never = (rows.segment_BL == 0) | (rows.position_BL == 0)
    assert int(never.sum()) == 32 + 31
    assert not masked[never].any()
    natural = (torch.arange(256) // 32 % 2 == 0)[None] & ~never
    assert (masked / drawn)[natural].mean().item() == pytest.approx(0.51, abs=0.01)
    answers = rows.mark_BL > 0
    assert (masked / drawn)[answers].mean().item() == pytest.approx(0.51, abs=0.02)
    prompts = ~answers & ~natural & ~never
    assert (masked / drawn)[prompts].mean().item() == pytest.approx(0.3 * 0.51, abs=0.02)


def test_predicted_positions_are_masked_ones_and_a_fixed_number() -> None:
    rows = packed_rows()
    for seed in range(20):
        batch = draw(seed, rows)
        assert batch.predicted_N.shape == (384,)
        assert batch.predicted_N.unique().shape == (384,)
        masked_N = batch.masked_BL.flatten()[batch.predicted_N]
        assert int(masked_N.sum()) == min(384, int(batch.masked_BL.sum()))
        assert torch.equal(batch.weight_N > 0, masked_N)
        marks_N = rows.mark_BL.flatten()[batch.predicted_N]
        assert torch.equal(batch.answer_N, masked_N & (marks_N == Mark.ANSWER))
        natural_N = (batch.segment_BL % 2 == 1).flatten()[batch.predicted_N]
        assert torch.equal(batch.natural_N, masked_N & natural_N)


def test_masks_follow_from_the_generator() -> None:
    rows = packed_rows()
    assert torch.equal(draw(1, rows).masked_BL, draw(1, rows).masked_BL)
    assert not torch.equal(draw(1, rows).masked_BL, draw(2, rows).masked_BL)


def test_rows_of_padding_lose_nothing() -> None:
    base = smol.random_base()
    network = Network(base, Dimensions.of(base, smol.HEAD_DIM), 4, torch.float32, 0)
    batch = draw(0, pack([], 1))
    loss = weighted_mean(cross_entropy(network, batch), batch.weight_N)
    loss.backward()
    assert loss.item() == 0
    assert all(bool(parameter.grad.isfinite().all()) for parameter in network.parameters())
