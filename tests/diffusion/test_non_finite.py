"""A pass that overflows ends whatever asked for it, and names the first block that did."""

from __future__ import annotations

import pytest
import torch

from starquant.diffusion import LikelihoodEstimator, MaskPredictor, ScoreRequest, generate
from starquant.errors import NonFiniteError
from starquant.models import family_of
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Role

PROMPT = torch.tensor([[5, 6, 7]])


def overflowing(model: MaskedDiffusionModel, block: int) -> MaskedDiffusionModel:
    """The model with down-projections so large, from a block on, that what they give is infinite."""
    for later in model.trunk().blocks[block:]:
        model.block_sites(later).linears[Role.DOWN].weight.data.fill_(3e38)
    return model


@pytest.mark.parametrize("block", [0, 1])
def test_a_generation_names_the_first_block(golden_model: MaskedDiffusionModel, block: int) -> None:
    sampler = family_of(golden_model).sampler.of_length(4)
    name = golden_model.block_name(block)
    with pytest.raises(NonFiniteError, match=rf"^{name}: its output is not finite \(.* went in\) in float32; allowed"):
        generate(overflowing(golden_model, block), PROMPT, sampler)


def test_a_likelihood_does_too_and_padding_does_not_matter(golden_model: MaskedDiffusionModel) -> None:
    requests = [ScoreRequest((5, 6, 7, 8), (9, 10)), ScoreRequest((5,), (9,))]
    estimator = LikelihoodEstimator(family_of(golden_model).noise, 2)
    assert all(score < 0 for score in estimator.score(MaskPredictor(golden_model), requests))
    with pytest.raises(NonFiniteError, match=golden_model.block_name(1)):
        estimator.score(MaskPredictor(overflowing(golden_model, 1)), requests)


def test_a_head_that_overflows_is_told_from_the_blocks(golden_model: MaskedDiffusionModel) -> None:
    trunk = golden_model.trunk()
    assert trunk.head is not None
    trunk.head.weight.data.fill_(3e38)
    with pytest.raises(NonFiniteError, match="the logits are not finite, the output of the last block is"):
        generate(golden_model, PROMPT, family_of(golden_model).sampler.of_length(4))
