"""Fidelity along block diffusion: a model follows itself exactly, and is measured in the block under way only."""

from __future__ import annotations

import pytest

from starquant.diffusion import BatchSize, SDARSampler
from starquant.evaluation.fidelity import measure, take_reference
from starquant.models import load_model
from tests.support.paths import GOLDEN

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15]]  # padded, and not


@pytest.mark.parametrize("remasking", SDARSampler.REMASKING[:2])
def test_a_model_follows_itself_exactly(remasking: str) -> None:
    model = load_model(GOLDEN / "sdar_gqa")
    sampler = SDARSampler(10, 4, steps_per_block=2, remasking=remasking, threshold=0.3, stop_ids=())
    reference = take_reference(model, PROMPTS, sampler, batch_size=BatchSize(2), seed=3)
    for prompt in reference.prompts:
        assert int((prompt.answers_SG[0] == model.mask_token_id).sum()) == 10
        assert max(len(residual_ND) for residual_ND in prompt.residual.values()) <= 4
    found = measure(model, reference, bins=2, resamples=50, seed=0, batch_size=BatchSize(2))
    scores = {score.metric: score.value for score in found.scores if score.filter == "all"}
    assert scores["kl"] == pytest.approx(0.0, abs=1e-9)
    assert (scores["top1_agreement"], scores["commit_flips"], scores["answer_flips"]) == (1.0, 0.0, 0.0)
