"""Fidelity along block diffusion: a model follows itself exactly, and is measured in the block under way only."""

from __future__ import annotations

import pytest
import torch

from starquant.diffusion import BatchSize, LLaDA2Sampler, LLaDA21Sampler, SDARSampler
from starquant.diffusion.samplers import BlockSampler
from starquant.evaluation.fidelity import measure, take_reference
from starquant.models import load_model
from tests.support.paths import GOLDEN

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15]]  # padded, and not
SAMPLERS: dict[str, tuple[str, BlockSampler]] = {
    **{
        name: ("sdar_gqa", SDARSampler(10, 4, steps_per_block=2, remasking=name, threshold=0.3, stop_ids=()))
        for name in SDARSampler.REMASKING[:2]
    },
    "llada2": ("llada2_moe_a", LLaDA2Sampler(10, 4, steps_per_block=3, eos_early_stop=False)),
    "edits": ("llada2_moe_a", LLaDA21Sampler(10, 4, threshold=0.02, editing_threshold=0.0)),
    "looks again, edits nothing": ("llada2_moe_a", LLaDA21Sampler(10, 4, threshold=0.02, editing_threshold=1.0)),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("together", [(2, 2), (1, 3)], ids=["same batches", "other batches"])
def test_a_model_follows_itself_exactly(name: str, together: tuple[int, int]) -> None:
    """Also where prompts measured side by side took different numbers of steps, and where tokens were replaced."""
    folder, sampler = SAMPLERS[name]
    model = load_model(GOLDEN / folder)
    reference = take_reference(model, PROMPTS, sampler, batch_size=BatchSize(together[0]), seed=3)
    for prompt in reference.prompts:
        assert int((prompt.answers_SG[0] == model.mask_token_id).sum()) == 10
        assert max(len(residual_ND) for residual_ND in prompt.residual.values()) <= 4
    if name == "edits":
        masked = [prompt.answers_SG == model.mask_token_id for prompt in reference.prompts]
        changed = [p.answers_SG.diff(dim=0) != 0 for p in reference.prompts]
        assert any(bool((c & ~m[:-1]).any()) for c, m in zip(changed, masked, strict=True))
    found = measure(model, reference, bins=2, resamples=50, seed=0, batch_size=BatchSize(together[1]))
    scores = {score.metric: score.value for score in found.scores if score.filter == "all"}
    assert scores["kl"] == pytest.approx(0.0, abs=1e-6)
    assert (scores["top1_agreement"], scores["commit_flips"], scores["answer_flips"]) == (1.0, 0.0, 0.0)
    steps = [row for row in found.items if row["step"] is not None]
    assert len({row["prompt"] for row in steps}) == len(PROMPTS)
    assert all(torch.isfinite(torch.tensor(row["kl"])) for row in steps)
