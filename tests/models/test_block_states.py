"""Token states of block diffusion: against a plain loop, and the same in passes with and without kept keys."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starquant.diffusion import (
    DreamNoise,
    LikelihoodEstimator,
    LLaDA2Sampler,
    LLaDA21Sampler,
    MaskPredictor,
    ScoreRequest,
    SDARSampler,
    generate,
)
from starquant.diffusion.generation import left_padded
from starquant.diffusion.samplers import BlockSampler
from starquant.models import FAMILIES, load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.models.context import Context
from starquant.models.roles import ExpertSite, Site
from starquant.numerics import BIDIRECTIONAL, States
from starquant.numerics.token_states import BLOCK_DIFFUSION, EDITING, block_state_indices
from tests.support.models import fresh
from tests.support.paths import GOLDEN

MASK = 9


def by_a_loop(ids: list[int], positions: list[int], visible: list[bool], length: int, states: States) -> list[str]:
    """The states of one row's real tokens, read off the words of the definition."""
    real = [i for i in range(len(ids)) if visible[i]]
    copies, copy = {}, 0
    for before, i in pairwise([None, *real]):
        copy += before is not None and positions[i] <= positions[before]
        copies[i] = copy
    last = max(copies.values())
    final = max(positions[i] // length for i in real if copies[i] == last)
    found = []
    for i in real:
        own = [j for j in real if copies[j] == copies[i] and positions[j] // length == positions[i] // length]
        holds = any(ids[j] == MASK for j in own)
        denoised = holds or copies[i] < last or (last == 0 and positions[i] // length == final)
        state = "context" if not denoised else "edited" if "edited" in states and not holds else "committed"
        found.append("masked" if ids[i] == MASK else state)
    return found


def layouts(rows: int, length: int, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """Positions and visible tokens of rows, by name."""
    everything = torch.ones(rows, length, dtype=torch.bool)
    counting = torch.arange(length).expand(rows, length)
    padding = torch.randint(0, length // 2, (rows, 1), generator=generator)
    left = (counting - padding).clamp_min(0)
    right = torch.minimum(counting, length - 1 - padding)
    half = length // 2
    twice = torch.cat((torch.arange(half), torch.arange(length - half))).expand(rows, length)
    answer = torch.cat((torch.arange(4, half), torch.arange(length - half + 4))).expand(rows, length)
    return {
        "plain": (counting, everything),
        "one for all rows": (counting[:1], everything),
        "padded on the left": (left, counting >= padding),
        "padded on the right": (right, counting < length - padding),
        "noisy and clean": (twice, everything),
        "noisy answer and clean": (answer, everything),
        "noisy and clean, padded": (twice.clone(), counting < length - 3),
    }


@pytest.mark.parametrize("states", [BLOCK_DIFFUSION, EDITING])
@pytest.mark.parametrize("length", [1, 3, 4, 50])
def test_states_are_those_of_a_plain_loop(states: States, length: int) -> None:
    generator, seen = torch.Generator().manual_seed(3), set()
    for name, (positions, visible) in layouts(40, 23, generator).items():
        ids = torch.randint(0, MASK, (40, 23), generator=generator)
        masked = torch.rand(40, 23, generator=generator) < torch.rand(40, 1, generator=generator) ** 4
        ids[masked] = MASK
        got = block_state_indices(ids == MASK, positions, None if bool(visible.all()) else visible, length, states)
        for row in range(40):
            own = positions[row % len(positions)].tolist()
            want = by_a_loop(ids[row].tolist(), own, visible[row].tolist(), length, states)
            assert [states[i].value for i in got[row][visible[row]].tolist()] == want, name
            seen.update(want)
    alone = {"committed"} if length == 1 and "edited" in states else set()  # beside no mask of its block
    assert seen == {state.value for state in states} - alone


@pytest.mark.parametrize("architecture", ["llada_gqa", "mixture", "sdar", "llada2"])
def test_a_model_and_its_blocks_declare_the_same_states(architecture: str) -> None:
    model = fresh(architecture)
    declared = {"sdar": BLOCK_DIFFUSION, "llada2": EDITING}.get(architecture, BIDIRECTIONAL)
    assert model.states == model.block_sites(model.trunk().blocks[0]).states == declared
    assert {FAMILIES.load(name).model.states for name in ("sdar", "llada2", "llada_moe")} == {
        BIDIRECTIONAL,
        BLOCK_DIFFUSION,
        EDITING,
    }


class Recorder(nn.Module):
    """Keeps what a site is told of its tokens."""

    def __init__(self, told: list[Tensor]) -> None:
        super().__init__()
        self.told = told

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self.told.append(context.state_BL.clone())
        return x


def told_at(model: MaskedDiffusionModel, site: Site | ExpertSite, block: int = 0) -> list[Tensor]:
    told: list[Tensor] = []
    model.block_sites(model.trunk().blocks[block]).inputs[site].transform = Recorder(told)
    return told


GOLDEN_SAMPLERS: dict[str, tuple[str, type[BlockSampler], dict[str, Any]]] = {
    "sdar": ("sdar_gqa", SDARSampler, {"gen_length": 14, "block_length": 4, "stop_ids": ()}),
    "llada2": ("llada2_moe_a", LLaDA2Sampler, {"gen_length": 20, "block_length": 8, "threshold": 0.5}),
    "llada2_1": (
        "llada2_moe_a",
        LLaDA21Sampler,
        {"gen_length": 20, "block_length": 8, "threshold": 0.5, "editing_threshold": 0.3, "max_post_steps": 4},
    ),
}


def prompts(rows: int, length: int = 10) -> Tensor:
    return torch.randint(0, 290, (rows, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", GOLDEN_SAMPLERS)
def test_kept_keys_change_no_state(name: str) -> None:
    folder, sampler, settings = GOLDEN_SAMPLERS[name]
    told = {}
    for cache in (True, False):
        model = load_model(GOLDEN / folder)
        told[cache] = told_at(model, Site.QKV)
        generate(model, prompts(1), sampler(**settings, cache=cache))
    assert len(told[True]) == len(told[False])
    names: set[str] = set()
    for kept, whole in zip(told[True], told[False], strict=True):
        assert torch.equal(kept, whole[:, -kept.shape[1] :])
        names |= {model.states[i].value for i in whole.unique().tolist()}
    assert names == {"masked", "committed", "context"} | ({"edited"} if name == "llada2_1" else set())
    assert any(a.shape[1] < b.shape[1] for a, b in zip(told[True], told[False], strict=True))


@pytest.mark.parametrize("name", GOLDEN_SAMPLERS)
def test_a_padded_row_has_the_states_it_has_alone(name: str) -> None:
    folder, sampler, settings = GOLDEN_SAMPLERS[name]
    some = [prompts(1, length)[0].tolist() for length in (9, 5, 14)]
    alone = []
    for prompt in some:
        model = load_model(GOLDEN / folder)
        told = told_at(model, Site.QKV)
        generate(model, torch.tensor([prompt]), sampler(**settings, cache=False))
        alone.append(told)
    model = load_model(GOLDEN / folder)
    together = told_at(model, Site.QKV)
    ids, visible = left_padded(some, 302)
    generate(model, ids, sampler(**settings), attention_mask=visible)
    padding = [int((~row).sum()) for row in visible]
    for row, passes in enumerate(alone):
        found = [told[row, padding[row] :].tolist() for told in together]
        want = [told[0].tolist() for told in passes]
        place = 0
        for states in want:  # in between, passes in which the other rows go on
            place = next(i for i in range(place, len(found)) if found[i][: len(states)] == states) + 1


def test_the_layout_of_training_has_the_states_of_the_passes_that_it_stands_for() -> None:
    """A noisy block behind clean ones, for every block at once; an expert's tokens are told their own."""
    model = load_model(GOLDEN / "llada2_moe_a")
    told, clean = told_at(model, Site.QKV), prompts(1, 21)
    noisy = clean.clone()
    noisy[0, [9, 12, 17, 18, 20]] = 390
    positions = torch.arange(21)[None].repeat(1, 2)
    model.block_length = 8
    model(torch.cat((noisy, clean), 1), position_ids=positions)
    assert {model.states[i].value for i in told[0][0, 21:].tolist()} == {"context"}
    for begin in (8, 16):
        model(torch.cat((clean[:, :begin], noisy[:, begin : begin + 8]), 1))  # the last block is not whole
        end = min(begin + 8, 21)
        assert torch.equal(told[-1][0, begin:], told[0][0, begin:end])
        assert {model.states[i].value for i in told[-1][0, :begin].tolist()} == {"context"}


@torch.no_grad()
def test_an_expert_is_told_the_states_of_its_own_tokens() -> None:
    model = load_model(GOLDEN / "llada2_moe_a")
    ids = prompts(2, 24)
    ids[:, 18:22] = 390
    whole = told_at(model, Site.GATE_UP, 1)
    by_expert = [told_at(model, ExpertSite(Site.DOWN, e), 1) for e in range(8)]
    chosen: list[Tensor] = []
    gate = model.model.layers[1].mlp.gate
    choose = gate.choose
    gate.choose = lambda x: (lambda pair: (chosen.append(pair[1]), pair)[1])(choose(x))
    model(ids)
    for expert, told in enumerate(by_expert):
        places = (chosen[0].flatten(0, 1) == expert).any(1).nonzero()[:, 0]
        assert sorted(told[0][0].tolist()) == sorted(whole[0].flatten()[places].tolist())


def test_likelihood_tells_noisy_blocks_from_clean_ones() -> None:
    model = load_model(GOLDEN / "sdar_gqa")
    told = told_at(model, Site.QKV)
    requests = [ScoreRequest((5, 6, 7, 8, 9), (11, 12, 13, 14)), ScoreRequest((8,), (14, 15))]
    LikelihoodEstimator(DreamNoise(append_eos=False), 7).score(MaskPredictor(model), requests)
    (states,) = told
    context = model.states.index(BLOCK_DIFFUSION[-1])
    longest = states[0]
    assert not bool((longest[:9] == context).any())
    assert bool((longest[9:18] == context).all())


@torch.no_grad()
def test_the_mask_ratio_is_that_of_the_blocks_that_are_denoised() -> None:
    model = load_model(GOLDEN / "sdar_gqa")
    clean = prompts(1, 12)
    noisy = clean.clone()
    noisy[0, 9:] = 300
    ratio = model.context(noisy).mask_ratio_B
    assert ratio.tolist() == [0.75]
    positions = torch.arange(12)[None].repeat(1, 2)
    assert model.context(torch.cat((noisy, clean), 1), None, positions).mask_ratio_B.tolist() == [3 / 12]
    cache = model.committed_cache()
    cache.ahead(8, 12)
    cache.ahead(8, 12)
    assert cache.window == slice(8, 12)
    assert model.context(noisy, cache=cache).mask_ratio_B.tolist() == [0.75]
