"""Calibration states of block diffusion: noisy blocks behind clean text, and what is learned of each token state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates, Segment
from starquant.calibration.block_states import behind_clean_text, rows_of_blocks
from starquant.calibration.masked_states import State, add_certainty, make_states
from starquant.calibration.site_statistics import LEAST_EDITED, Collect
from starquant.calibration.walk import walk
from starquant.config.calibration import CalibrationSpec, StatesSpec
from starquant.config.methods import METHODS
from starquant.diffusion import LLaDA21Sampler, Sampler, SDARSampler
from starquant.diffusion.generation import left_padded
from starquant.diffusion.trajectories import record_trajectory
from starquant.methods.fitted import block_part
from starquant.models import load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.numerics.token_states import BLOCK_DIFFUSION, EDITING, TokenState
from tests.support.methods import method_named
from tests.support.models import fresh, logits
from tests.support.paths import GOLDEN


def segments(count: int, least: int = 10) -> list[Segment]:
    generator = torch.Generator().manual_seed(0)
    return [
        Segment(tuple(torch.randint(0, 110, (least + i % 7,), generator=generator).tolist()), i % 6, f"{i}")
        for i in range(count)
    ]


def calibration(sampler: str, **fields: object) -> CalibrationSpec:
    return CalibrationSpec(name="test", states=StatesSpec(sampler=sampler, **fields), bins=4)


def made(
    model: MaskedDiffusionModel, sampler: Sampler, how: str, count: int = 24, **fields: object
) -> CalibrationStates:
    return make_states(segments(count), calibration(how, **fields), model, sampler, batch_size=5)


def test_every_block_is_masked_behind_clean_text() -> None:
    model = fresh("sdar")
    states = made(model, SDARSampler(8, 4), "uniform", per_segment=2)
    clean = {segment.ids: segment.prompt_length for segment in segments(24)}
    seen = 0
    for batch in states.batches:
        for ids_L, visible_L, position_L, ratio in zip(
            batch.ids_BL, batch.visible_BL, batch.position_BL, batch.ratio_B.tolist(), strict=True
        ):
            ids, positions = ids_L[visible_L].tolist(), position_L[visible_L].tolist()
            begin = next(i for i in range(1, len(ids)) if positions[i] == 0 < positions[i - 1])
            text, noisy = tuple(ids[begin:]), ids[:begin]
            prompt = clean[text]
            first = prompt // 4 * 4
            assert positions == [*range(first, len(text)), *range(len(text))]
            assert all(a in (b, 119) for a, b in zip(noisy, text[first:], strict=True))
            assert 119 not in noisy[: prompt - first]
            assert ratio == noisy.count(119) / (len(text) - prompt)
            seen += 1
    assert seen == 48
    assert sum(states.report["context_tokens"]) == 2 * sum(len(ids) for ids in clean)
    named = {f"{state.value}_tokens" for state in BLOCK_DIFFUSION}
    assert {key for key in states.report if key.endswith("_tokens")} == named
    assert states.tokens(model) == [sum(states.report[f"{state.value}_tokens"]) for state in BLOCK_DIFFUSION]


def test_blocks_of_the_prompt_alone_are_read_clean() -> None:
    state = State(torch.tensor([1, 2, 3, 4, 5, 9, 9, 8]), 2 / 3)
    segment = Segment((1, 2, 3, 4, 5, 6, 7, 8), 5, "")
    got = behind_clean_text(state, segment, 4)
    assert got.ids.tolist() == [5, 9, 9, 8, 1, 2, 3, 4, 5, 6, 7, 8]
    assert got.positions is not None
    assert got.positions.tolist() == [4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]
    assert got.ratio == state.ratio


@torch.no_grad()
def test_a_noisy_block_reads_what_generation_reads() -> None:
    """What the sites of a walk see of a noisy block is what a pass over it behind the clean text gives."""
    model = fresh("sdar")
    states = made(model, SDARSampler(8, 4), "uniform", count=3, min_ratio=0.5)
    visit = next(iter(walk(model, states)))
    got: list[Tensor] = []
    visit.block.register_forward_hook(lambda _, __, out: got.append(out))
    visit.observe()
    (batch,) = states.batches
    hidden = got[0][0][batch.visible_BL[0]]
    ids, positions = batch.ids_BL[0][batch.visible_BL[0]], batch.position_BL[0][batch.visible_BL[0]]
    begin = next(i for i in range(1, len(ids)) if positions[i] == 0 < positions[i - 1])
    text = ids[begin:]
    for start in range(int(positions[0]), len(text), 4):
        block = slice(start - int(positions[0]), min(start + 4, len(text)) - int(positions[0]))
        whole = torch.cat((text[:start], ids[block]))[None]
        apart: list[Tensor] = []
        handle = model.trunk().blocks[0].register_forward_hook(lambda _, __, out, into=apart: into.append(out))
        logits(model, whole)
        handle.remove()
        torch.testing.assert_close(apart[0][0, start:], hidden[block], rtol=1e-4, atol=1e-5)


def test_a_state_of_a_trajectory_ends_with_the_block_that_is_denoised() -> None:
    model = load_model(GOLDEN / "sdar_gqa")
    prompt = torch.tensor([[5, 6, 7, 8, 9, 10]])
    sampler = SDARSampler(10, 4, stop_ids=())
    trajectory = record_trajectory(model, prompt, sampler)
    (states,) = rows_of_blocks(trajectory, 4, False)
    assert [len(state.ids) for state in states] == [8] * 2 + [12] * 4 + [16] * 4 + [16]
    assert [state.ratio for state in states] == [0.5, 0.25, *[1.0, 0.75, 0.5, 0.25] * 2, 0.0]
    for state, ids_L in zip(states, trajectory.ids_SBL[:, 0], strict=True):
        assert state.ids.tolist() == ids_L[: len(state.ids)].tolist()
        assert not bool((state.ids[: len(state.ids) - 4] == 300).any())
    rows = made(fresh("sdar"), SDARSampler(8, 4), "trajectory", per_segment=4)
    for batch in rows.batches:
        assert batch.position_BL is None
        context = batch.context(fresh("sdar"))
        ratios = [
            float(((ids == 119) & visible).sum()) for ids, visible in zip(batch.ids_BL, batch.visible_BL, strict=True)
        ]
        assert (context.mask_ratio_B > 0).tolist() == [ratio > 0 for ratio in ratios]
        torch.testing.assert_close(context.mask_ratio_B.double(), batch.ratio_B, rtol=0, atol=1e-6)


def test_passes_that_only_edit_are_states_of_the_finished_block() -> None:
    """Against the published sampler's own record: how often each block is run without a mask."""
    model = load_model(GOLDEN / "llada2_moe_a")
    model.block_length = 8
    sampler = LLaDA21Sampler(24, 8, threshold=0.5, editing_threshold=0.3, max_post_steps=4)
    ran: list[list[int]] = []

    def note(_: object, __: object, given: dict) -> None:
        ran.append(given["input_ids"][0].tolist())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    trajectory = record_trajectory(model, torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]), sampler)
    handle.remove()
    (states,) = rows_of_blocks(trajectory, 8, True)
    assert [state.ids.tolist() for state in states[:-1]] == ran
    assert any(state.ratio == 0.0 for state in states[:-1])


@pytest.mark.parametrize("name", ["sdar", "llada2_1"])
def test_states_of_a_trajectory_do_not_depend_on_the_batch(name: str) -> None:
    """Rows wait for others, which fill and edit their blocks in more steps; none of that is a state."""
    if name == "sdar":
        model, sampler = load_model(GOLDEN / "sdar_gqa"), SDARSampler(12, 4, threshold=0.02, stop_ids=())
    else:
        model = load_model(GOLDEN / "llada2_moe_a")
        sampler = LLaDA21Sampler(12, 4, threshold=0.02, editing_threshold=0.005, max_post_steps=3)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [4, 4, 9, 20]]

    def states(batch: int) -> list[list[tuple[list[int], float]]]:
        rows = []
        for begin in range(0, len(prompts), batch):
            ids_BP, visible_BP = left_padded(prompts[begin : begin + batch], 0)
            trajectory = record_trajectory(model, ids_BP, sampler, attention_mask=visible_BP)
            rows += [list(row) for row in rows_of_blocks(trajectory, 4, name == "llada2_1")]
        return [[(state.ids.tolist(), state.ratio) for state in row] for row in rows]

    alone, together = states(1), states(4)
    assert len({len(row) for row in alone}) > 1
    assert together == alone


def test_certainty_is_that_of_the_noisy_pass() -> None:
    model = fresh("llada2")
    states = add_certainty(made(model, SDARSampler(8, 4), "uniform"), model)
    batch = states.batches[0]
    with torch.no_grad():
        out = model(batch.ids_BL, attention_mask=batch.visible_BL, position_ids=batch.position_BL).logits
    weight_BL = torch.where(batch.ids_BL == 119, 1.0, 0.7) + out.softmax(-1).amax(-1).sqrt()
    torch.testing.assert_close(batch.weight_BL, weight_BL * batch.visible_BL, rtol=1e-4, atol=1e-5)


def test_statistics_are_kept_by_state() -> None:
    """Counts and moments of each state against the tokens themselves; together they are all."""
    model = fresh("llada2")
    states = made(model, SDARSampler(8, 4), "uniform", count=96)
    visit = next(iter(walk(model, states)))
    rows: list[tuple[Tensor, Tensor]] = []
    for site, found in visit.collect(Collect(rows=16, second_moment="state")).items():
        handle = visit.sites.inputs[site].register_forward_hook(
            lambda _, args, out: rows.append((out, args[1].state_BL))
        )
        visit.observe()
        handle.remove()
        everything = [
            torch.cat([x[(s == axis) & b.visible_BL] for (x, s), b in zip(rows, states.batches, strict=True)])
            for axis in range(4)
        ]
        assert found.tokens == [len(x) for x in everything] == states.tokens(model)
        for state, x_ND in zip(EDITING, everything, strict=True):
            torch.testing.assert_close(found.moments(state).mean, x_ND.double().mean(0), rtol=1e-5, atol=1e-7)
            moment = x_ND.double().T @ x_ND.double() / len(x_ND)
            torch.testing.assert_close(found.second_moment(state).mean, moment, rtol=1e-5, atol=1e-7)
        others = torch.cat(everything[1:]).double()
        together = found.second_moment(EDITING[1:]).mean
        torch.testing.assert_close(together, others.T @ others / len(others), rtol=1e-5, atol=1e-7)
        assert found.moments().count == sum(found.tokens)
        assert found.learned_states() == (EDITING if found.tokens[2] >= LEAST_EDITED else (*EDITING[:2], EDITING[3]))
        rows.clear()
        break


def test_clip_ratios_of_states_are_learned_apart() -> None:
    """One a declared state; what is edited, which is rare here, is clipped as what is committed."""
    for architecture, declared in (("sdar", BLOCK_DIFFUSION), ("llada2", EDITING)):
        model = fresh(architecture)
        method, bits = method_named("star_quant", "bits=w4a4", "method.transform.steps=12")
        few = made(model, SDARSampler(8, 4), "uniform", min_ratio=0.4)
        fitted = method.fit(model, bits, few)
        clip_S = fitted.get(block_part(0))["down_input.state_clip"]
        assert clip_S.shape == (len(declared),)
        learned = [clip_S[declared.index(s)] for s in (TokenState.MASKED, TokenState.COMMITTED, TokenState.CONTEXT)]
        assert len({float(x) for x in learned}) == 3
        if TokenState.EDITED in declared:
            assert few.tokens(model)[2] < LEAST_EDITED
            assert clip_S[2] == clip_S[1]
        row = next(r for r in fitted.report if (r["block"], r["site"]) == (0, "down_input"))
        assert {k for k in row if k.startswith("error_")} == {"error_masked", "error_committed", "error_context"}


def test_maps_of_states_are_learned_apart() -> None:
    model = fresh("sdar")
    for condition, maps in (("state", 3), ("bin", 12)):
        method, bits = method_named("star_quant", "bits=w4a4", f"method.tac.condition={condition}")
        fitted = method.fit(model, bits, made(model, SDARSampler(8, 4), "uniform", count=96))
        matrices = fitted.get(block_part(0))["tac.matrix"]
        assert len(matrices) == maps
        quantized = fresh("sdar")
        METHODS.build(method.options).apply(quantized, fitted, bits)
        assert bool(logits(quantized, torch.tensor([[1, 2, 3, 4, 5, 119, 119]])).isfinite().all())
