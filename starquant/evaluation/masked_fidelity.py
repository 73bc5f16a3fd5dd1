"""How closely a quantized model follows full precision on text of which a share is masked.

Every segment is masked at several ratios; the predictions at its masked positions are compared. One forward pass a
state, where trajectories take one a step: the cheapest and most sensitive measure there is. Block diffusion sees each
block masked behind clean ones, as it generates: the layout [noisy ; clean] of its training, in one pass.

Shape suffixes: B batch, L tokens, N measured positions, D model width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starquant.calibration.batches import Segment, padded_states
from starquant.calibration.block_states import State
from starquant.calibration.masked_states import uniform_states_of
from starquant.config.calibration import StatesSpec
from starquant.diffusion import BatchSize, MaskPredictor
from starquant.diffusion.special_tokens import eos_token_ids, padding_id
from starquant.errors import CheckpointError, DataError
from starquant.evaluation.compared_rows import Fidelity, compare_predictions, compare_rows, finite
from starquant.evaluation.reference import Head, WatchedPredictor, by_length
from starquant.evaluation.trajectory_metrics import evenly, summarize
from starquant.models.base import MaskedDiffusionModel
from starquant.numerics import all_finite
from starquant.session.progress import SILENT, Progress


@dataclass(frozen=True)
class MaskedState:
    """A masked segment and full precision's view of it, on the CPU.

    Attributes:
        segment: its number.
        state: which of the segment's masks.
        doc_hash: digest of the segment's tokens.
        ids_L: token ids, [MASK] where masked; of block diffusion followed by the clean ones.
        ratio: masked share of the maskable tokens.
        group: of the segment.
        columns_N: where predictions are compared.
        residual_ND: full precision's residual stream before the last norm that predicts them.
        positions_L: of every token; None where they count up.
    """

    segment: int
    state: int
    doc_hash: str
    ids_L: Tensor
    ratio: float
    group: str
    columns_N: Tensor
    residual_ND: Tensor
    positions_L: Tensor | None = None


@dataclass(frozen=True)
class MaskedReference:
    """Masked states, and what recomputes full precision's logits on them."""

    states: tuple[MaskedState, ...]
    head: Head

    @property
    def nbytes(self) -> int:
        """Host memory of what is kept."""
        return self.head.nbytes + sum(state.residual_ND.nbytes + state.ids_L.nbytes for state in self.states)


@torch.inference_mode()
def take_masked_reference(
    model: MaskedDiffusionModel,
    segments: Sequence[Segment],
    states: StatesSpec,
    *,
    batch_size: BatchSize,
    seed: int,
    max_positions: int = 64,
    progress: Progress = SILENT,
) -> MaskedReference:
    """Mask every segment and keep what full precision's predictions are recomputed from.

    End tokens that follow an end token say nothing and are not measured.

    Args:
        model: at full precision.
        segments: of text.
        states: "uniform": how many masks a segment, and which ratios.
        batch_size: states at a time; padded on the right.
        seed: of the masks.
        max_positions: masked positions measured a state; of more, evenly spaced ones stand for all.
        progress: draws a bar.

    Raises:
        DataError: no segments, or none with a masked token.
        CheckpointError: hidden states that are not finite.
    """
    watched, made = WatchedPredictor(model), list[MaskedState]()
    drawn = uniform_states_of(model, segments, states, seed)
    wanted = []
    for index, state in enumerate(drawn):
        clean_L = _clean(state, segments[index // states.per_segment])
        columns_N = _measured(clean_L, state.ids == watched.mask_id, eos_token_ids(watched.config), max_positions)
        if len(columns_N):
            wanted.append((index, state, columns_N))
    if not wanted:
        raise DataError("fidelity.source: it gives no segment with a masked token")

    def record(batch: Sequence[int]) -> list[MaskedState]:
        chosen = [wanted[i] for i in batch]
        rows = [(state.ids, state.positions, columns_N) for _, state, columns_N in chosen]
        parts = _hidden(watched, rows)
        kept = []
        for (index, state, columns_N), (residual_ND, _) in zip(chosen, parts, strict=True):
            segment, mask = divmod(index, states.per_segment)
            own = segments[segment]
            digest = hashlib.sha256(json.dumps(own.ids).encode()).hexdigest()[:16]
            place = segment, mask, digest, state.ids, state.ratio, own.group, columns_N
            kept.append(MaskedState(*place, residual_ND.cpu(), state.positions))
        return kept

    for _, kept in by_length([len(s.ids) for _, s, _ in wanted], batch_size, record, "reference", progress, "state"):
        made += kept
    made.sort(key=lambda state: (state.segment, state.state))
    if not all(all_finite(state.residual_ND) for state in made):
        raise CheckpointError("fidelity: full-precision hidden states are not finite")
    return MaskedReference(tuple(made), Head.of(model))


@torch.inference_mode()
def measure_masked(
    model: MaskedDiffusionModel,
    reference: MaskedReference,
    *,
    bins: int,
    resamples: int,
    seed: int,
    batch_size: BatchSize,
    progress: Progress = SILENT,
    predict: MaskPredictor | None = None,
) -> Fidelity:
    """Compare a model with the reference on every state; arguments as of `fidelity.measure`.

    Returns:
        One row a state: top1_agreement, kl, confidence_drift, confidence_bias and hidden_mse. Scores are given for all
        segments, by mask-ratio bin, and for each group of segments.

    Raises:
        CheckpointError: predictions that are not finite.
    """
    watched, states = WatchedPredictor(model), reference.states

    def compare(batch: Sequence[int]) -> list[dict[str, Any]]:
        chosen = [states[i] for i in batch]
        if predict is not None:
            return [_compare_predictions(predict, reference, state) for state in chosen]
        return [*_compare(watched, reference, chosen)]

    items: list[dict[str, Any]] = []
    for _, rows in by_length([len(s.ids_L) for s in states], batch_size, compare, "fidelity", progress, "state"):
        items += rows
    items.sort(key=lambda row: (row["prompt"], row["step"]))
    by_group = Fidelity([], items).by_group
    scores = [score for name, rows in by_group.items() for score in summarize(rows, bins, resamples, seed, name)]
    return Fidelity(scores, items)


def _clean(state: State, segment: Segment) -> Tensor:
    """Return what a state's tokens are without masks."""
    clean_L = torch.tensor(segment.ids)
    return clean_L if state.positions is None else clean_L[state.positions]


def _measured(clean_L: Tensor, masked_L: Tensor, eos_ids: Sequence[int], most: int) -> Tensor:
    repeated_L = torch.zeros_like(masked_L)
    for eos_id in eos_ids:
        repeated_L[1:] |= (clean_L[1:] == eos_id) & (clean_L[:-1] == eos_id)
    return evenly((masked_L & ~repeated_L).nonzero()[:, 0], most)


def _hidden(
    watched: WatchedPredictor, states: Sequence[tuple[Tensor, Tensor | None, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each row's (residual stream, the same after the last norm) [N, D] at its columns.

    A state is its ids, their positions (None where they count up), and the columns.
    """
    ids, positions, columns = zip(*states, strict=True)
    ids_BL, visible_BL, position_BL = padded_states(ids, positions, padding_id(watched.config))
    visible = None if bool(visible_BL.all()) else visible_BL.to(watched.device)
    watched.watch(ids_BL.to(watched.device), visible, None if position_BL is None else position_BL.to(watched.device))
    rows = torch.cat([torch.full_like(columns_N, row) for row, columns_N in enumerate(columns)])
    residual, normed = watched.hidden(rows, torch.cat(columns))
    sizes = [len(columns_N) for columns_N in columns]
    return zip(residual.split(sizes), normed.split(sizes), strict=True)


def _compare(
    watched: WatchedPredictor, reference: MaskedReference, states: Sequence[MaskedState]
) -> Iterator[dict[str, Any]]:
    parts = _hidden(watched, [(s.ids_L, s.positions_L, s.columns_N) for s in states])
    for state, (residual_ND, normed_ND) in zip(states, parts, strict=True):
        full_ND = state.residual_ND.to(watched.device)
        rows_N = torch.zeros(len(full_ND), dtype=torch.long, device=full_ND.device)
        metrics = compare_rows(reference.head, watched.model, full_ND, residual_ND, normed_ND, rows_N, 1)
        yield _row(state, metrics)


def _compare_predictions(predict: MaskPredictor, reference: MaskedReference, state: MaskedState) -> dict[str, Any]:
    rows_N = torch.zeros_like(state.columns_N)
    position_BL = None if state.positions_L is None else state.positions_L[None]
    logits_NV = predict(state.ids_L[None], (rows_N, state.columns_N), position_BL=position_BL)
    return _row(state, compare_predictions(reference.head, state.residual_ND, logits_NV, rows_N, 1))


def _row(state: MaskedState, metrics: dict[str, Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": state.segment,
        "doc_hash": state.doc_hash,
        "step": state.state,
        "mask_ratio": state.ratio,
    }
    row |= {"group": state.group} if state.group else {}
    return row | {metric: finite(value_1[0], metric, row) for metric, value_1 in metrics.items()}
