"""Segments -> partly masked states, as a masked-diffusion model meets them; `block_states` has those of blocks.

Shape suffixes: B rows of a batch, L sequence, S states of a trajectory, N selected positions, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates, Segment, StateBatch, bin_of, padded_states
from starquant.calibration.block_states import State, behind_clean_text, rows_of_blocks
from starquant.calibration.segments import prompts_of
from starquant.config.calibration import CalibrationSpec, StatesSpec
from starquant.diffusion import MaskPredictor, Sampler
from starquant.diffusion.generation import left_padded
from starquant.diffusion.masking import seeded_generator
from starquant.diffusion.samplers import BlockSampler, LLaDA21Sampler
from starquant.diffusion.sampling import log_probability
from starquant.diffusion.special_tokens import padding_id
from starquant.diffusion.trajectories import Trajectory, record_trajectory
from starquant.errors import ConfigError, DataError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.block_causal import BlockCausalModel
from starquant.session.progress import SILENT, Progress

#: Of a batch of states: 16 rows of 512 tokens, 4 of 2,048, whose probabilities are 2 GB in float32 at 32 heads.
TOKENS, MOST_ROWS = 8192, 16


def make_states(
    segments: Sequence[Segment],
    spec: CalibrationSpec,
    model: MaskedDiffusionModel,
    sampler: Sampler,
    *,
    batch_size: int | None = None,
    report: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
    bos: int | None = None,
) -> CalibrationStates:
    """Return the states of `spec.states`, rows of similar length together, padded on the right.

    "clean" gives every segment once, unmasked. "uniform" and "trajectory" give `per_segment` states a segment,
    drawn from `spec.seed` and the segment's own tokens, so that they do not depend on the batch size.

    Of block diffusion a state of "uniform" is the layout [noisy ; clean] of training, in which every block is masked
    behind clean ones, and one of "trajectory" ends with the block that is denoised.

    Args:
        segments: what `read_segments` returns.
        spec: of the calibration.
        model: at full precision; only "trajectory" runs it, and it is not changed.
        sampler: of the trajectories.
        batch_size: rows of a batch, also while trajectories are recorded; None for as many as `TOKENS` allow.
        report: plain data to put in front of the states' report (source, fingerprint).
        progress: draws a bar while trajectories are recorded.
        bos: stays in front of a prompt that begins with it, whatever is cut of it.

    Raises:
        ConfigError: more states a segment than the trajectory has steps; an answer that fills the context.
        DataError: [MASK] in a segment; a mask-ratio bucket with fewer states than `shares` asks for.
    """
    mask_id = model.mask_token_id
    if any(mask_id in segment.ids for segment in segments):
        raise DataError(f"calibration.source: the text holds the model's mask token (id {mask_id})")
    if spec.states.sampler == "clean":
        states = [State(torch.tensor(segment.ids), 0.0) for segment in segments]
    elif spec.states.sampler == "uniform":
        states = uniform_states_of(model, segments, spec.states, spec.seed)
    else:
        prompts = prompts_of(segments, sampler.answer_length, int(model.config.context_length), bos=bos)
        longest = sampler.answer_length + max(map(len, prompts), default=0)
        states = _from_trajectories(prompts, spec, model, sampler, batch_size or _rows_of(longest), progress)
    longest = max((len(state.ids) for state in states), default=0)
    batches = _batches(states, batch_size or _rows_of(longest), padding_id(model.config))
    experts: dict[str, Any] = {"least_tokens": spec.experts.least_tokens, "rare_experts": spec.experts.rare}
    made = CalibrationStates(batches, mask_id, spec.bins, spec.inputs, **experts)
    return replace(made, report={**(report or {}), "segments": len(segments), **_counts(made, model)})


def _rows_of(longest: int) -> int:
    """Return how many rows of up to so many tokens a batch has."""
    return max(1, min(MOST_ROWS, TOKENS // max(1, longest)))


def _strata(segments: int, per_segment: int, seed: int) -> list[list[int]]:
    """Deal the strata 0 .. segments * per_segment - 1 out, each once; a segment's lie `segments` apart."""
    order = list(range(segments))
    random.Random(seed).shuffle(order)
    return [[first + segments * state for state in range(per_segment)] for first in order]


def uniform_states(segments: Sequence[Segment], spec: StatesSpec, mask_id: int, seed: int) -> list[State]:
    """Return `per_segment` states of every segment, in its order: mask ratios t ~ U(min_ratio, max_ratio), stratified.

    Args:
        segments: of text; prompts are not masked.
        spec: its ratios and number of states.
        mask_id: of [MASK].
        seed: mixed with each segment's own tokens.
    """
    low, high, per_segment = spec.min_ratio, spec.max_ratio, spec.per_segment
    strata = _strata(len(segments), per_segment, seed)
    states = []
    for segment, own in zip(segments, strata, strict=True):
        generator = seeded_generator(seed, "calibration", segment.ids)
        maskable = len(segment.ids) - segment.prompt_length
        for stratum in own:
            u = float(torch.rand((), generator=generator, dtype=torch.float64))
            ratio = low + (high - low) * (stratum + u) / (len(segments) * per_segment)
            count = round(ratio * maskable)
            ids = torch.tensor(segment.ids)
            ids[segment.prompt_length + torch.randperm(maskable, generator=generator)[:count]] = mask_id
            states.append(State(ids, count / max(1, maskable)))
    return states


def uniform_states_of(
    model: MaskedDiffusionModel, segments: Sequence[Segment], spec: StatesSpec, seed: int
) -> list[State]:
    """Return `uniform_states` as a model meets them: those of block diffusion in the layout [noisy ; clean]."""
    states = uniform_states(segments, spec, model.mask_token_id, seed)
    if not isinstance(model, BlockCausalModel):
        return states
    clean = [segment for segment in segments for _ in range(spec.per_segment)]
    return [behind_clean_text(*pair, model.block_length) for pair in zip(states, clean, strict=True)]


def validate_per_segment(per_segment: int, sampler: Sampler) -> None:
    """Refuse more states of a segment than its trajectory has steps; raises ConfigError."""
    if per_segment > sampler.steps:
        raise ConfigError(
            f"calibration.states.per_segment: got {per_segment}, allowed: at most the trajectory's "
            f"{sampler.steps} steps"
        )


def _from_trajectories(
    prompts: Sequence[Sequence[int]],
    spec: CalibrationSpec,
    model: MaskedDiffusionModel,
    sampler: Sampler,
    batch_size: int,
    progress: Progress,
) -> list[State]:
    validate_per_segment(spec.states.per_segment, sampler)
    pad = padding_id(model.config)
    recorded: dict[int, list[State]] = {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    chunks = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    for chunk in progress.bar(chunks, "calibration trajectories", "batch"):
        ids_BP, visible_BP = left_padded([prompts[i] for i in chunk], pad)
        trajectory = record_trajectory(model, ids_BP, sampler, attention_mask=visible_BP, seed=spec.seed)
        recorded |= zip(chunk, _rows(trajectory, model, sampler), strict=True)
    trajectories = [recorded[i] for i in range(len(prompts))]
    chosen = _evenly(trajectories, spec) if spec.states.shares is None else _by_shares(trajectories, spec)
    return [trajectories[i][step] for i, step in chosen]


def _rows(trajectory: Trajectory, model: MaskedDiffusionModel, sampler: Sampler) -> Iterator[list[State]]:
    """Yield each row's states, from fully masked to the final one."""
    if isinstance(model, BlockCausalModel):
        length = sampler.block_length if isinstance(sampler, BlockSampler) else model.block_length
        yield from rows_of_blocks(trajectory, length, isinstance(sampler, LLaDA21Sampler))
        return
    answer_SBG = trajectory.ids_SBL[:, :, trajectory.prompt_length :]
    masked_SB = (answer_SBG == trajectory.mask_id).sum(2)
    for row, masked_S in enumerate(masked_SB.T.tolist()):
        ids_SL = trajectory.ids_SBL[
            :, row, trajectory.visible_BL[row]
        ].int()  # half the memory: all are kept for a while
        yield [State(ids, masked / answer_SBG.shape[2]) for ids, masked in zip(ids_SL, masked_S, strict=True)]


def _evenly(trajectories: Sequence[Sequence[State]], spec: CalibrationSpec) -> list[tuple[int, int]]:
    """Spread the states over the steps, all trajectories together running from the first state to the final one."""
    per_segment = spec.states.per_segment
    strata, most = _strata(len(trajectories), per_segment, spec.seed), max(1, len(trajectories) * per_segment - 1)
    scales = [(len(states) - 1) / most for states in trajectories]  # of block diffusion not all have as many
    return [(i, math.floor(stratum * scales[i] + 0.5)) for i, own in enumerate(strata) for stratum in own]


def _by_shares(trajectories: Sequence[Sequence[State]], spec: CalibrationSpec) -> list[tuple[int, int]]:
    """Draw exactly the shares' numbers from each bucket, from the trajectories with the fewest draws so far."""
    shares = spec.states.shares or ()
    rng = random.Random(spec.seed)
    unused: list[list[list[int]]] = []  # bucket -> trajectory -> steps
    buckets = [
        bin_of(torch.tensor([s.ratio for s in t], dtype=torch.float64), len(shares)).tolist() for t in trajectories
    ]
    for bucket in range(len(shares)):
        unused.append([[step for step, k in enumerate(steps) if k == bucket] for steps in buckets])
    drawn = [0] * len(trajectories)
    chosen = []
    for bucket, count in enumerate(shared_counts(shares, len(trajectories) * spec.states.per_segment)):
        available = sum(map(len, unused[bucket]))
        if count > available:
            width = 1 / len(shares)
            raise DataError(
                f"calibration.states.shares: {count} states are asked for with mask ratios from {bucket * width:g} "
                f"to {(bucket + 1) * width:g}, the recorded trajectories have {available} there"
            )
        for _ in range(count):
            fewest = min(drawn[i] for i, steps in enumerate(unused[bucket]) if steps)
            i = rng.choice([i for i, steps in enumerate(unused[bucket]) if steps and drawn[i] == fewest])
            steps = unused[bucket][i]
            chosen.append((i, steps.pop(rng.randrange(len(steps)))))
            drawn[i] += 1
    return sorted(chosen)


def shared_counts(shares: Sequence[float], total: int) -> list[int]:
    """Return whole numbers in proportion to the shares that add up to `total` (largest remainders)."""
    exact = [share / sum(shares) * total for share in shares]
    counts = [math.floor(x + 1e-9) for x in exact]
    order = sorted(range(len(shares)), key=lambda k: counts[k] - exact[k])
    for k in order[: total - sum(counts)]:
        counts[k] += 1
    return counts


def _batches(states: Sequence[State], batch_size: int, pad: int) -> list[StateBatch]:
    by_length = sorted(states, key=lambda state: len(state.ids))
    batches = []
    for begin in range(0, len(by_length), batch_size):
        rows = by_length[begin : begin + batch_size]
        ids_BL, visible_BL, position_BL = padded_states([s.ids for s in rows], [s.positions for s in rows], pad)
        ratio_B = torch.tensor([state.ratio for state in rows], dtype=torch.float64)  # bins are told apart to 1e-9
        batches.append(StateBatch(ids_BL, visible_BL, ratio_B, position_BL=position_BL))
    return batches


def _counts(states: CalibrationStates, model: MaskedDiffusionModel) -> dict[str, Any]:
    total = torch.zeros(1 + len(model.states), states.bins, dtype=torch.long)  # states, tokens of each token state
    for batch in states.batches:
        state_BL = model.token_states(batch.ids_BL, batch.visible_BL, batch.position_BL)
        of_states = [((state_BL == axis) & batch.visible_BL).sum(1) for axis in range(len(model.states))]
        counts = torch.stack((torch.ones(len(batch.ids_BL), dtype=torch.long), *of_states))
        total.index_add_(1, bin_of(batch.ratio_B, states.bins), counts)
    rows, *tokens = total.tolist()
    return {
        "states": sum(rows),
        "states_per_bin": rows,
        **{f"{state.value}_tokens": counts for state, counts in zip(model.states, tokens, strict=True)},
        "empty_bins": [k for k, count in enumerate(rows) if count == 0],
    }


@torch.no_grad()
def add_certainty(
    states: CalibrationStates, model: MaskedDiffusionModel, masked: float = 1.0, unmasked: float = 0.7
) -> CalibrationStates:
    """Weight every token by m + sqrt(c), c the model's largest probability there (CGQ, arXiv 2508.14090).

    Args:
        states: made by `make_states`.
        model: at full precision; not changed.
        masked: m of masked tokens.
        unmasked: m of the others.

    Returns:
        The same states with float32 weights; padding weighs 0.
    """
    predict = MaskPredictor(model)
    batches = []
    for batch in states.batches:
        kind_BL = torch.where(batch.ids_BL == states.mask_id, masked, unmasked)
        certainty_BL = _certainty(predict, batch)
        weight_BL = torch.where(batch.visible_BL, kind_BL + certainty_BL.sqrt(), 0.0)
        batches.append(replace(batch, weight_BL=weight_BL))
    return replace(states, batches=batches)


def _certainty(predict: MaskPredictor, batch: StateBatch) -> Tensor:
    """Return the largest probability at every visible position; 0 on padding."""
    certainty_BL = torch.zeros(batch.ids_BL.shape)
    rows, columns = batch.visible_BL.nonzero(as_tuple=True)
    ids_BL, visible_BL = batch.ids_BL.to(predict.device), batch.visible_BL.to(predict.device)
    position_BL = None if batch.position_BL is None else batch.position_BL.to(predict.device)
    at = rows.to(predict.device), columns.to(predict.device)
    passes = predict.chunks(ids_BL, at, visible_BL=visible_BL, position_BL=position_BL)
    top = [log_probability(l_NV, l_NV.argmax(1)) for _, l_NV in passes]
    certainty_BL[rows, columns] = torch.cat(top).exp().cpu()
    return certainty_BL
