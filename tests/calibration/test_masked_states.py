"""Masked states: exact counts, strata, trajectories, shares, and certainty weights against a slow forward."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from starquant.calibration import masked_states
from starquant.calibration.batches import CalibrationStates, Segment
from starquant.calibration.masked_states import add_certainty, make_states, shared_counts
from starquant.calibration.segments import prompts_of, read_segments
from starquant.config.calibration import TMAS_SHARES, CalibrationSpec, SourceSpec, StatesSpec
from starquant.diffusion import DreamSampler, LLaDASampler, generate, predictor
from starquant.errors import ConfigError, DataError
from starquant.models import family_of
from starquant.models.base import MaskedDiffusionModel

SAMPLER = LLaDASampler(steps=8, gen_length=8, block_length=8)


def calibration(sampler: str, bins: int = 4, seed: int = 0, **fields: object) -> CalibrationSpec:
    return CalibrationSpec(name="test", states=StatesSpec(sampler=sampler, **fields), bins=bins, seed=seed)


def random_segments(count: int, seed: int = 0, prompts: bool = True) -> list[Segment]:
    """Tokens 10 .. 309: no special token of any model here."""
    rng = random.Random(seed)
    lengths = [rng.randint(12, 30) for _ in range(count)]
    return [
        Segment(tuple(rng.randrange(10, 310) for _ in range(n)), rng.randint(1, 9) if prompts else 0, f"text {n}")
        for n in lengths
    ]


def rows(states: CalibrationStates) -> list[tuple[tuple[int, ...], float]]:
    """Each row's visible ids and ratio."""
    found = []
    for batch in states.batches:
        for ids, visible, ratio in zip(batch.ids_BL, batch.visible_BL, batch.ratio_B.tolist(), strict=True):
            found.append((tuple(ids[visible].tolist()), ratio))
    return found


def of_segment(segment: Segment, states: CalibrationStates) -> list[tuple[tuple[int, ...], float]]:
    """The rows that are a segment with some tokens masked."""
    mask = states.mask_id
    return [
        (ids, ratio)
        for ids, ratio in rows(states)
        if len(ids) == len(segment.ids) and all(a in (b, mask) for a, b in zip(ids, segment.ids, strict=True))
    ]


def test_clean_states_are_the_segments(golden_model: MaskedDiffusionModel) -> None:
    segments = random_segments(11)
    states = make_states(segments, calibration("clean"), golden_model, SAMPLER, batch_size=4)
    assert Counter(rows(states)) == Counter((s.ids, 0.0) for s in segments)
    assert [len(b.ids_BL) for b in states.batches] == [4, 4, 3]
    widths = [(b.ids_BL.shape[1], int(b.visible_BL.sum(1).min())) for b in states.batches]
    assert all(width <= shortest_of_next for (width, _), (_, shortest_of_next) in itertools.pairwise(widths))
    pad = golden_model.config.eos_token_id
    assert all(bool((b.ids_BL[~b.visible_BL] == pad).all()) for b in states.batches)
    assert states.mask_id == golden_model.mask_token_id and states.bins == 4 and states.inputs == "full_precision"


@pytest.mark.parametrize("prompts", [True, False])
def test_uniform_masks_exact_numbers_in_strata(prompts: bool, tiny: MaskedDiffusionModel) -> None:
    segments, low, high, per_segment = random_segments(25, prompts=prompts), 0.2, 0.9, 4
    spec = calibration("uniform", min_ratio=low, max_ratio=high, per_segment=per_segment)
    states = make_states(segments, spec, tiny, SAMPLER)
    total = len(segments) * per_segment
    assert len(rows(states)) == total
    taken = set()
    for segment in segments:
        own = sorted(of_segment(segment, states), key=lambda row: row[1])
        assert len(own) == per_segment
        maskable = len(segment.ids) - segment.prompt_length
        for number, (ids, ratio) in enumerate(own):
            count = ids.count(states.mask_id)
            assert states.mask_id not in ids[: segment.prompt_length]
            assert ratio == pytest.approx(count / maskable, abs=1e-12)
            # The rounded ratio lies in this state's quarter of [low, high], up to half a token.
            asked = (ratio - low) / (high - low) * per_segment
            slack = per_segment * 0.5 / maskable / (high - low) + 1e-9
            assert number - slack <= asked <= number + 1 + slack
            taken.add(ids)
    assert len(taken) == total


def test_uniform_ratios_fill_every_stratum(tiny: MaskedDiffusionModel) -> None:
    """With 1000 maskable tokens rounding is finer than the strata: each of the 20 holds one state."""
    segments = [Segment(tuple(random.Random(i).choices(range(10, 310), k=1000)), 0, "") for i in range(10)]
    states = make_states(segments, calibration("uniform", per_segment=2), tiny, SAMPLER)
    ratios = sorted(ratio for _, ratio in rows(states))
    assert all(k / 20 - 5e-4 <= ratio <= (k + 1) / 20 + 5e-4 for k, ratio in enumerate(ratios))


def test_uniform_masks_every_position_alike(tiny: MaskedDiffusionModel) -> None:
    segment, seeds = Segment(tuple(range(10, 30)), 4, ""), 400
    spec = [calibration("uniform", seed=s, min_ratio=0.5, max_ratio=0.5) for s in range(seeds)]
    masked = torch.zeros(20)
    for one in spec:
        (batch,) = make_states([segment], one, tiny, SAMPLER).batches
        masked += (batch.ids_BL[0] == tiny.mask_token_id).float()
        assert int((batch.ids_BL == tiny.mask_token_id).sum()) == 8
    assert masked[:4].sum() == 0
    deviation = math.sqrt(seeds * 0.25)
    assert (masked[4:] - seeds / 2).abs().max() < 4.5 * deviation


@pytest.mark.parametrize("sampler", ["uniform", "trajectory"])
def test_states_depend_on_the_seed_but_not_on_batches(sampler: str, tiny: MaskedDiffusionModel) -> None:
    segments = random_segments(9)

    def made(seed: int, batch_size: int) -> Counter[tuple[tuple[int, ...], float]]:
        spec = calibration(sampler, seed=seed, per_segment=2)
        return Counter(rows(make_states(segments, spec, tiny, SAMPLER, batch_size=batch_size)))

    assert made(1, 2) == made(1, 16) != made(2, 16)


def test_report_counts_states_and_tokens(tiny: MaskedDiffusionModel) -> None:
    segments = random_segments(13)
    spec = calibration("uniform", bins=5, max_ratio=0.55, per_segment=3)
    states = make_states(segments, spec, tiny, SAMPLER, batch_size=5, report={"source": {"kind": "text"}})
    count, masked, unmasked = [0] * 5, [0] * 5, [0] * 5
    for ids, ratio in rows(states):
        k = next(k for k in range(5) if ratio <= (k + 1) / 5 + 1e-12)
        count[k] += 1
        masked[k] += ids.count(states.mask_id)
        unmasked[k] += len(ids) - ids.count(states.mask_id)
    assert states.report == {
        "source": {"kind": "text"},
        "segments": 13,
        "states": 39,
        "states_per_bin": count,
        "masked_tokens": masked,
        "unmasked_tokens": unmasked,
        "empty_bins": [3, 4],
    }
    assert 0 not in count[:3]


def replay(
    model: MaskedDiffusionModel, prompt: Sequence[int], sampler: LLaDASampler | DreamSampler, seed: int
) -> list[tuple[int, ...]]:
    """Every state of one prompt alone, without padding: fully masked first, the finished text last."""
    seen: list[tuple[int, ...]] = [(*prompt, *[model.mask_token_id] * sampler.answer_length)]

    def keep(_: int, ids_BL: Tensor, __: Tensor | None) -> None:
        seen.append(tuple(ids_BL[0].tolist()))

    generate(model, torch.tensor([prompt]), sampler, seed=seed, on_step=keep)
    return seen


def steps_of(
    states: CalibrationStates,
    segments: Sequence[Segment],
    model: MaskedDiffusionModel,
    sampler: LLaDASampler | DreamSampler,
    seed: int = 0,
) -> list[list[int]]:
    """The steps each segment's states were taken at, every row accounted for."""
    remaining = Counter(ids for ids, _ in rows(states))
    found = []
    for prompt in prompts_of(segments, sampler.answer_length, model.config.context_length):
        own = [step for step, ids in enumerate(replay(model, prompt, sampler, seed)) if remaining[ids]]
        found.append(own)
    assert sum(map(len, found)) == sum(remaining.values())
    return found


def mask_share(ids: Sequence[int], mask: int, answer: int) -> float:
    return list(ids).count(mask) / answer


def test_trajectory_states_are_evenly_spread(tiny: MaskedDiffusionModel) -> None:
    segments = random_segments(12)
    states = make_states(segments, calibration("trajectory", per_segment=3), tiny, SAMPLER, batch_size=5)
    steps = steps_of(states, segments, tiny, SAMPLER)
    assert {len(set(own)) for own in steps} == {3}
    # 36 states over the 9 states of a trajectory: the inner steps 4 or 5 times, the two ends half as often.
    times = Counter(step for own in steps for step in own)
    assert sorted(times) == list(range(9)) and times[0] in (2, 3) and times[8] in (2, 3)
    assert all(times[step] in (4, 5) for step in range(1, 8))
    for ids, ratio in rows(states):
        assert ratio == mask_share(ids, states.mask_id, 8)


def test_trajectories_of_both_families(golden_model: MaskedDiffusionModel) -> None:
    dream = family_of(golden_model).name == "dream"
    sampler = DreamSampler(steps=5, max_new_tokens=10) if dream else SAMPLER
    segments = random_segments(7, prompts=False)
    states = make_states(segments, calibration("trajectory", per_segment=2), golden_model, sampler, batch_size=3)
    steps = steps_of(states, segments, golden_model, sampler)
    assert {len(own) for own in steps} == {2} and {0, sampler.steps} <= {step for own in steps for step in own}
    for ids, ratio in rows(states):
        assert ratio == mask_share(ids, states.mask_id, sampler.answer_length)


def test_one_state_of_one_trajectory_is_fully_masked(tiny: MaskedDiffusionModel) -> None:
    states = make_states(random_segments(1), calibration("trajectory"), tiny, SAMPLER)
    assert [ratio for _, ratio in rows(states)] == [1.0]


@pytest.mark.parametrize("shares", [TMAS_SHARES, (0.1, 0.9), (0.0, 0.0, 1.0)])
def test_shares_of_ratio_buckets_are_exact(shares: tuple[float, ...], tiny: MaskedDiffusionModel) -> None:
    segments, per_segment = random_segments(20), 2
    spec = calibration("trajectory", bins=len(shares), per_segment=per_segment, shares=shares)
    states = make_states(segments, spec, tiny, SAMPLER)
    assert states.report["states_per_bin"] == [round(share * 40) for share in shares]
    steps = steps_of(states, segments, tiny, SAMPLER)
    assert {len(set(own)) for own in steps} == {per_segment}


def test_the_finished_text_is_in_the_lowest_bucket(tiny: MaskedDiffusionModel) -> None:
    """Of 8 steps, three states have at most a quarter of the answer masked: 2/8, 1/8 and none."""
    segments = random_segments(4)
    spec = calibration("trajectory", per_segment=3, shares=(1.0, 0.0, 0.0, 0.0))
    states = make_states(segments, spec, tiny, SAMPLER)
    assert Counter(ratio for _, ratio in rows(states)) == {0.0: 4, 0.125: 4, 0.25: 4}
    assert all(own == [6, 7, 8] for own in steps_of(states, segments, tiny, SAMPLER))


@pytest.mark.parametrize(
    ("shares", "total", "counts"),
    [
        (TMAS_SHARES, 10, [3, 2, 2, 3]),
        (TMAS_SHARES, 128, [38, 26, 26, 38]),  # 38.4, 25.6, 25.6, 38.4
        ((0.5, 0.25, 0.25), 3, [1, 1, 1]),
        ((1 / 3, 1 / 3, 1 / 3), 6, [2, 2, 2]),
        ((0.1, 0.7, 0.2), 10, [1, 7, 2]),
    ],
)
def test_largest_remainders(shares: Sequence[float], total: int, counts: list[int]) -> None:
    assert shared_counts(shares, total) == counts


def test_refusals(tiny: MaskedDiffusionModel) -> None:
    segments = random_segments(3)
    two_steps = LLaDASampler(steps=2, gen_length=8, block_length=8)  # ratios 1, 0.5, 0
    with pytest.raises(DataError, match=r"ratios from 0\.5 to 0\.75, the recorded trajectories have 0 there"):
        spec = calibration("trajectory", shares=(0.25, 0.25, 0.25, 0.25), per_segment=2)
        make_states(segments, spec, tiny, two_steps)
    with pytest.raises(DataError, match=r"6 states are asked for with mask ratios from 0\.5 to 1, .* have 3 there"):
        make_states(segments, calibration("trajectory", shares=(0.0, 1.0), per_segment=2), tiny, two_steps)
    with pytest.raises(ConfigError, match=r"per_segment: got 3, allowed: at most the trajectory's 2 steps"):
        make_states(segments, calibration("trajectory", per_segment=3), tiny, two_steps)
    with pytest.raises(ConfigError, match=r"model\.trajectory: the answer's 256 tokens do not fit"):
        whole = LLaDASampler(steps=1, gen_length=256, block_length=256)
        make_states(segments, calibration("trajectory"), tiny, whole)
    with pytest.raises(DataError, match="holds the model's mask token"):
        make_states([Segment((5, tiny.mask_token_id), 0, "")], calibration("clean"), tiny, SAMPLER)


def slow_certainty(model: MaskedDiffusionModel, ids: Sequence[int]) -> Tensor:
    """Largest probability for each token of one row, from the logits of the whole row, shifted by hand."""
    with torch.no_grad():
        logits_LV = model(input_ids=torch.tensor([ids])).logits[0].double()
    if model.logit_offset == -1:
        logits_LV = torch.cat((logits_LV[:1], logits_LV[:-1]))
    return logits_LV.softmax(1).amax(1)


@pytest.mark.parametrize("most", [2**27, 40, 7])  # positions together
def test_certainty_weights(most: int, golden_model: MaskedDiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "_ELEMENTS", {"cpu": most * golden_model.trunk().embedding.num_embeddings})
    made = make_states(random_segments(5), calibration("uniform", min_ratio=0.3), golden_model, SAMPLER, batch_size=3)
    weighted = add_certainty(made, golden_model, masked=1.5, unmasked=0.25)
    assert weighted.report == made.report and len(weighted.batches) == len(made.batches) == 2
    for batch, before in zip(weighted.batches, made.batches, strict=True):
        assert batch.weight_BL is not None and before.weight_BL is None and torch.equal(batch.ids_BL, before.ids_BL)
        assert not batch.weight_BL[~batch.visible_BL].any() and not batch.weight_BL.is_inference()
        for ids, visible, weight in zip(batch.ids_BL, batch.visible_BL, batch.weight_BL, strict=True):
            kind = torch.where(ids[visible] == made.mask_id, 1.5, 0.25)
            expected = kind + slow_certainty(golden_model, ids[visible].tolist()).sqrt()
            torch.testing.assert_close(weight[visible].double(), expected, atol=2e-5, rtol=0)


def test_the_model_stays_as_it_is(golden_model: MaskedDiffusionModel) -> None:
    before = {name: value.clone() for name, value in golden_model.state_dict().items()}
    sampler = DreamSampler(4, 4) if family_of(golden_model).name == "dream" else SAMPLER
    states = make_states(random_segments(3), calibration("trajectory"), golden_model, sampler)
    add_certainty(states, golden_model)
    after = golden_model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and p.requires_grad for p in golden_model.parameters()) and not golden_model.training


def test_generated_items_of_the_embedded_model(tiny: MaskedDiffusionModel, tiny_tokenizer) -> None:
    """The preset as it is: trajectories end in the items' own answers more often than not."""
    source = SourceSpec(kind="testbed", segments=24, length=64)
    segments = read_segments(source, tiny_tokenizer, tiny.config.context_length, seed=0)
    states = make_states(segments, calibration("trajectory", per_segment=2), tiny, SAMPLER)
    assert states.report["states"] == 48 and states.report["empty_bins"] == []
    finished = [ids for ids, ratio in rows(states) if ratio == 0.0]
    assert finished
    programs = [s for s in segments[3::4]]
    endings = [replay(tiny, s.ids[: s.prompt_length], SAMPLER, 0)[-1] for s in programs]
    assert sum(end == s.ids for end, s in zip(endings, programs, strict=True)) > len(programs) // 2


@pytest.mark.parametrize(("longest", "rows"), [(1, 16), (512, 16), (513, 15), (2048, 4), (8192, 1), (10**6, 1)])
def test_a_batch_of_long_states_has_fewer_rows(longest: int, rows: int) -> None:
    assert masked_states._rows_of(longest) == rows
