"""Token states in whole models: what generation, guidance and likelihood tell each site of the pass at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from starquant.diffusion import (
    BatchSize,
    DreamNoise,
    DreamSampler,
    LikelihoodEstimator,
    LLaDANoise,
    LLaDASampler,
    MaskPredictor,
    ScoreRequest,
    generate,
)
from starquant.models import load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.models.context import Context
from starquant.models.roles import Role, Site
from starquant.quantized import BlockAffine, SiteTransform, StateGate
from tests.support.models import llada_gqa, logits
from tests.support.paths import GOLDEN

MAKERS: dict[str, Callable[[], MaskedDiffusionModel]] = {
    "llada": llada_gqa,
    "dream": lambda: load_model(GOLDEN / "dream_gqa"),
}


@pytest.fixture(params=list(MAKERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str) -> MaskedDiffusionModel:
    return MAKERS[kind]()


@dataclass
class Pass:
    """Ids of one forward pass, its padding, and what each site was told."""

    ids: Tensor
    visible: Tensor | None
    sites: list[tuple[Tensor, Tensor]]


class Recorder(nn.Module):
    def __init__(self, passes: list[Pass]) -> None:
        super().__init__()
        self.passes = passes

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self.passes[-1].sites.append((context.masked_BL.clone(), context.mask_ratio_B.clone()))
        return x


def record(model: MaskedDiffusionModel) -> list[Pass]:
    """Note every pass and what each site of each block is told of it."""
    passes: list[Pass] = []

    def started(_: nn.Module, args: tuple, given: dict) -> None:
        ids = given["input_ids"] if "input_ids" in given else args[0]
        passes.append(Pass(ids.clone(), given.get("attention_mask"), []))

    model.register_forward_pre_hook(started, with_kwargs=True)
    for block in model.trunk().blocks:
        for site in Site:
            model.block_sites(block).inputs[site].transform = Recorder(passes)
    return passes


def expect_states(model: MaskedDiffusionModel, passes: list[Pass]) -> None:
    """Token by token: masked where the ids of that very pass are [MASK]; shares of what is visible."""
    assert passes
    for p in passes:
        rows = p.ids.tolist()
        states = [[token == model.mask_token_id for token in row] for row in rows]
        seen = [[True] * len(row) for row in rows] if p.visible is None else p.visible.bool().tolist()
        shares = [sum(m and v for m, v in zip(a, b, strict=True)) / sum(b) for a, b in zip(states, seen, strict=True)]
        assert len(p.sites) == 4 * len(model.trunk().blocks)
        for masked, share in p.sites:
            assert masked.tolist() == states
            assert share.tolist() == pytest.approx(shares)


def equip(model: MaskedDiffusionModel) -> MaskedDiffusionModel:
    """Put a gate at every site, and a correction of its own for each state and bin on attention outputs."""
    generator = torch.Generator().manual_seed(11)
    for block in model.trunk().blocks:
        sites = model.block_sites(block)
        for site in Site:
            width = next(iter(sites.readers(site).values())).in_features
            correction = None
            if site is Site.OUT:
                near = torch.eye(8) + 0.3 * torch.randn(8, width // 8, 8, 8, generator=generator)
                correction = BlockAffine(near, torch.zeros(8, width // 8, 8))
            sites.inputs[site].transform = SiteTransform(None, correction, StateGate(width, width // 8, width // 4))
    return model


def sampler_of(model: MaskedDiffusionModel, cfg: float = 0.0) -> LLaDASampler | DreamSampler:
    return LLaDASampler(6, 6, 6, cfg_scale=cfg) if model.logit_offset == 0 else DreamSampler(6, 6)


def test_gates_follow_a_token_that_is_filled_and_masked_again(model: MaskedDiffusionModel) -> None:
    equip(model)
    ids = torch.tensor([[5, 6, 7, model.mask_token_id, 8, model.mask_token_id]])
    filled = ids.clone()
    filled[0, 3] = 12
    down = [model.block_sites(block).linears[Role.DOWN] for block in model.trunk().blocks]
    seen: list[Tensor] = []
    for linear in down:
        linear.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    first, between, again = (logits(model, x) for x in (ids, filled, ids))
    assert torch.equal(first, again)
    assert not torch.allclose(first, between, atol=1e-2)
    width = down[0].in_features
    of_masked = set(range(width - width // 8 - width // 4, width - width // 4))
    of_others = set(range(width - width // 4, width))
    for index, x_LD in enumerate(seen):
        masked = {5} if index // len(down) == 1 else {3, 5}
        for position in range(6):
            zeros = set((x_LD[position] == 0).nonzero().flatten().tolist())
            assert zeros == (of_others if position in masked else of_masked), (index, position)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", ["mask", "other"])
def test_a_padded_row_is_what_it_is_alone(model: MaskedDiffusionModel, side: str, filler: str) -> None:
    equip(model)
    mask = model.mask_token_id
    rows = [[5, mask, 7, 8, 9, mask, mask, 3], [mask, 6, 7], [5, 6, 7, mask, mask]]
    ids = torch.full((3, 8), mask if filler == "mask" else 17)
    visible = torch.zeros(3, 8, dtype=torch.bool)
    at = [slice(8 - len(row), 8) if side == "left" else slice(0, len(row)) for row in rows]
    for b, row in enumerate(rows):
        ids[b, at[b]], visible[b, at[b]] = torch.tensor(row), True
    together = logits(model, ids, visible)
    for b, row in enumerate(rows):
        alone = logits(model, torch.tensor([row]))[0]
        torch.testing.assert_close(together[b, at[b]], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cfg", [0.0, 0.5])
def test_generation_tells_every_pass_its_own_states(model: MaskedDiffusionModel, cfg: float) -> None:
    if cfg and model.logit_offset:
        pytest.skip("Dream's sampler has no guidance")
    passes = record(model)
    mask, pad = model.mask_token_id, 17
    prompts = torch.tensor([[pad, pad, 5, 6], [7, 8, 9, 10]])
    visible = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    steps = [torch.cat((prompts, torch.full((2, 6), mask)), 1)]
    generate(
        model, prompts, sampler_of(model, cfg), attention_mask=visible, on_step=lambda _, x, __: steps.append(x.clone())
    )
    expect_states(model, passes)
    assert len(passes) == 6
    assert not bool((steps[6] == mask).any())
    for k, p in enumerate(passes):  # every pass was fed the ids that the step before left behind
        masked, share = p.sites[0]
        assert torch.equal(p.ids[:2], steps[k])
        left = int((steps[k][0] == mask).sum())
        assert left == 6 - k or model.logit_offset  # Dream's schedule starts late
        assert masked[:2, 4:].sum(1).tolist() == [left, left]
        assert not bool(masked[:2, :4].any())
        assert share[:2].tolist() == pytest.approx([left / 8, left / 10])
        assert len(masked) == (4 if cfg else 2)
        if cfg:
            assert bool(masked[2:, 4:].eq(masked[:2, 4:]).all())
            assert bool(masked[2, 2:4].all() & masked[3, :4].all())
            assert share[2:].tolist() == pytest.approx([(2 + left) / 8, (4 + left) / 10])


def test_guidance_gates_the_prompt_as_masked_in_its_own_branch_only(model: MaskedDiffusionModel) -> None:
    equip(model)
    mask = model.mask_token_id
    ids = torch.tensor([[5, 6, 7, mask, 8, mask], [9, 10, 11, 12, mask, mask]])
    prompt = torch.tensor([[True] * 3 + [False] * 3] * 2)
    rows, columns = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 5, 4, 5])
    got = MaskPredictor(model)(ids, (rows, columns), cfg_scale=0.8, prompt_BL=prompt)
    blind = torch.tensor([[mask, mask, mask, mask, 8, mask], [mask, mask, mask, 12, mask, mask]])
    source = columns + model.logit_offset
    with_prompt, without = (torch.stack([logits(model, x[b : b + 1])[0] for b in (0, 1)]) for x in (ids, blind))
    l_with, l_without = (x[rows, source] for x in (with_prompt, without))
    torch.testing.assert_close(got, l_without + 1.8 * (l_with - l_without), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(l_with, l_without, atol=1e-2)


def noise_of(model: MaskedDiffusionModel) -> LLaDANoise | DreamNoise:
    return LLaDANoise() if model.logit_offset == 0 else DreamNoise()


@pytest.mark.parametrize("cfg", [0.0, 0.5])
def test_likelihoods_tell_every_row_its_own_states(model: MaskedDiffusionModel, cfg: float) -> None:
    passes, mask = record(model), model.mask_token_id
    requests = [ScoreRequest((5, 6, 7), (11, 12, 13)), ScoreRequest((8,), (14, 15))]  # the second is padded
    LikelihoodEstimator(noise_of(model), 7, cfg).score(MaskPredictor(model), requests)
    expect_states(model, passes)
    (only,) = passes
    masked, share = only.sites[0]
    expected = []
    for prompt, target in ((3, 3), (1, 2)):
        for pattern in product([False, True], repeat=target):
            if any(pattern):
                padding = [True] * (6 - prompt - target)
                for blind in (False, True) if cfg else (False,):
                    states = (*([blind] * prompt), *pattern)
                    expected.append(((*states, *padding), round(sum(states) / len(states), 5)))
    found = [(tuple(m), round(s, 5)) for m, s in zip(masked.tolist(), share.tolist(), strict=True)]
    assert sorted(found) == sorted(expected)
    assert only.visible is not None
    assert int((only.ids == mask)[~only.visible.bool()].sum()) == int((~only.visible.bool()).sum())


@pytest.mark.parametrize("cfg", [0.0, 0.5])
def test_scores_of_a_gated_model_depend_on_no_batch(kind: str, model: MaskedDiffusionModel, cfg: float) -> None:
    predict = MaskPredictor(equip(model))
    requests = [ScoreRequest((5, 6, 7), (11, 12, 13)), ScoreRequest((8,), (14, 15)), ScoreRequest((), (16,))]
    one, many = (LikelihoodEstimator(noise_of(model), 7, cfg, BatchSize(n)).score(predict, requests) for n in (1, 32))
    assert many == pytest.approx(one, rel=1e-4, abs=1e-4)
    plain = MaskPredictor(MAKERS[kind]())
    assert LikelihoodEstimator(noise_of(model), 7, cfg).score(plain, requests) != pytest.approx(one, rel=1e-2)
