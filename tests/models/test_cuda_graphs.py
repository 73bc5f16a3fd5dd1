"""Replayed passes give the numbers of those they were made from; here a replay runs the work again, without a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from starquant.diffusion import LLaDASampler, generate
from starquant.models.base import MaskedDiffusionModel
from starquant.models.cuda_graphs import ReplayedBlocks, replayed
from tests.support.models import sdar


class Counted:
    """Stands for the capture of a graph."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, work: Callable[[], object]) -> Callable[[], object]:
        self.captured += 1
        work()

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


def ids(model: MaskedDiffusionModel, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    found = torch.randint(1, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
    found[:, length // 2 :] = model.mask_token_id
    return found


def test_a_pass_is_replayed_by_its_shape(golden_model: MaskedDiffusionModel) -> None:
    counted = Counted()
    cases = [ids(golden_model, rows, length, seed) for seed in (0, 1) for rows, length in ((1, 6), (2, 6), (1, 8))]
    with torch.inference_mode():
        expected = [golden_model(input_ids=case).logits for case in cases]
        golden_model.replayed_blocks = ReplayedBlocks(golden_model, captured=counted)
        found = [golden_model(input_ids=case).logits for case in cases]
        assert (counted.captured, counted.replayed) == (3, 6)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        golden_model(input_ids=cases[0], attention_mask=torch.ones_like(cases[0]))
        golden_model(input_ids=cases[0], output_hidden_states=True)
        assert counted.replayed == 6  # what is padded, or asks for more, runs as ever


def test_blocks_of_another_length_have_a_graph_of_their_own() -> None:
    """They have another mask, which a graph has captured; the stand-in keeps it as a graph does."""
    model = sdar()
    case = ids(model, 1, 8)

    def captured(work: Callable[[], object]) -> Callable[[], object]:
        length = model.block_length

        def replay() -> None:
            with model.blocks_of(length):
                work()

        return replay

    expected = []
    with torch.inference_mode():
        for length in (4, 2):
            with model.blocks_of(length):
                expected.append(model(input_ids=case).logits)
        assert not torch.equal(*expected)
        model.replayed_blocks = ReplayedBlocks(model, captured=captured)
        for length, logits in zip((4, 2, 4), (*expected, expected[0]), strict=True):
            with model.blocks_of(length):
                assert torch.equal(model(input_ids=case).logits, logits)


def test_the_least_recently_used_graph_is_given_up(golden_model: MaskedDiffusionModel) -> None:
    counted = Counted()
    blocks = ReplayedBlocks(golden_model, most=2, captured=counted)
    for length in (4, 5, 4, 6, 4, 5):
        blocks(ids(golden_model, 1, length))
    assert counted.captured == 4  # 4, 5, 6 in place of 5, 5 in place of 6


def test_a_result_outlives_the_next_replay(golden_model: MaskedDiffusionModel) -> None:
    blocks = ReplayedBlocks(golden_model, captured=Counted())
    first = blocks(ids(golden_model, 1, 6, 0))
    kept = first.clone()
    blocks(ids(golden_model, 1, 6, 1))
    assert torch.equal(first, kept)


@pytest.mark.gpu
def test_a_graph_gives_the_same_answer(golden_model: MaskedDiffusionModel) -> None:
    model = golden_model.cuda()
    sampler = LLaDASampler(8, 8, 8)
    expected = generate(model, ids(model, 1, 6), sampler, seed=0)
    with replayed(model):
        assert torch.equal(generate(model, ids(model, 1, 6), sampler, seed=0), expected)
    assert model.replayed_blocks is None
