"""How closely a quantized masked-diffusion model follows full precision along denoising trajectories.

A quantized model replaces the full-precision one in memory, so that a reference is taken first. The quantized
model is then shown every state of the full-precision trajectories (teacher forcing), and generates freely once.

Shape suffixes: B batch, P prompt, G answer tokens, L = P + G, S states, N measured positions, D model width,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from starquant.diffusion import BatchSize, MaskPredictor, generate
from starquant.diffusion.generation import left_padded
from starquant.diffusion.samplers import DenoisingState
from starquant.diffusion.special_tokens import padding_id
from starquant.evaluation.compared_rows import Fidelity, compare_predictions, compare_rows, finite
from starquant.evaluation.reference import (
    PromptReference,
    Reference,
    WatchedPredictor,
    by_length,
    take_reference,
)
from starquant.evaluation.trajectory_metrics import (
    commit_flips,
    committed,
    measured_positions,
    summarize,
)
from starquant.models.base import MaskedDiffusionModel
from starquant.session.progress import SILENT, Progress

__all__ = ["Fidelity", "Reference", "measure", "take_reference"]


@torch.inference_mode()
def measure(
    model: MaskedDiffusionModel,
    reference: Reference,
    *,
    bins: int,
    resamples: int,
    seed: int,
    batch_size: BatchSize,
    progress: Progress = SILENT,
    predict: MaskPredictor | None = None,
) -> Fidelity:
    """Compare a model with the reference on every state, then let it generate from the same prompts and seeds.

    At masked answer positions of a state (metrics as `trajectory_metrics.compare_logits` defines them, on the plain
    softmax: without guidance, temperature or the samplers' filters): top1_agreement, kl, confidence_drift and
    confidence_bias; hidden_mse, the relative squared error of the residual stream before the last norm;
    commit_flips, the share of (position, token) pairs committed by full precision in this step that the model,
    at the same state with the same number of commits and the same random draws, does not commit. Of the free
    run: answer_flips, the share of all answer tokens that differ, and same_answer.

    Args:
        model: usually quantized; of the reference's checkpoint.
        reference: from `take_reference`.
        bins: equally wide mask-ratio bins that scores are also given for.
        resamples: of the bootstrap over prompts.
        seed: of the bootstrap.
        batch_size: prompts at a time.
        progress: draws a bar.
        predict: another engine's predictions in the place of the model's; without hidden states, so without hidden_mse.

    Raises:
        NonFiniteError: predictions that are not finite.
        CheckpointError: a metric that is not finite.
    """
    watched = WatchedPredictor(model)
    items: list[dict[str, Any]] = []
    lengths = [len(prompt.prompt) + reference.sampler.answer_length for prompt in reference.prompts]

    def compare(batch: Sequence[int]) -> list[dict[str, Any]]:
        free = _run_freely(model if predict is None else predict, model.config, reference, batch)
        return [*_follow(watched if predict is None else predict, reference, batch), *free]

    for _, rows in by_length(lengths, batch_size, compare, "fidelity", progress):
        items += rows
    items.sort(key=lambda row: (row["prompt"], row["step"] is None, row["step"]))
    return Fidelity(summarize(items, bins, resamples, seed), items)


def _follow(watched: MaskPredictor, reference: Reference, batch: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the rows of teacher-forced states. Random draws are those of full precision: they depend on the state."""
    parts, device = [reference.prompts[i] for i in batch], watched.device
    ids_BP, visible_BP = left_padded([p.prompt for p in parts], padding_id(watched.config))
    answers_SBG, width = _side_by_side([p.answers_SG for p in parts]), ids_BP.shape[1]
    prompt_BL = torch.cat((torch.ones_like(visible_BP), torch.zeros_like(answers_SBG[0], dtype=torch.bool)), 1)
    visible_BL = None if bool(visible_BP.all()) else torch.cat((visible_BP, ~prompt_BL[:, width:]), 1).to(device)
    generators = [torch.Generator().manual_seed(p.seed) for p in parts]
    for step, (before_BG, after_BG) in enumerate(itertools.pairwise(answers_SBG)):
        if not bool((before_BG == watched.mask_id).any()):  # tokens are replaced only
            continue
        commit_B = committed(before_BG, after_BG, watched.mask_id).sum(1)
        ids_BL = torch.cat((ids_BP, before_BG), 1).to(device)
        state = DenoisingState(ids_BL, width, visible_BL, generators, prompt_BL=prompt_BL.to(device))
        reference.sampler.advance(watched, state, step, commit_B.to(device))
        reach_BG = reference.sampler.reach(before_BG, visible_BP.sum(1), watched.mask_id)
        rows, columns = measured_positions(before_BG, after_BG, watched.mask_id, reference.max_positions, reach_BG)
        if len(rows) == 0:
            continue
        full_ND = torch.cat([parts[b].residual[step] for b in rows.unique().tolist()]).to(device)
        if isinstance(watched, WatchedPredictor):
            at = watched.hidden(rows, columns + width)
            metrics = compare_rows(reference.head, watched.model, full_ND, *at, rows.to(device), len(batch))
        else:
            logits_NV = watched(torch.cat((ids_BP, before_BG), 1), (rows, columns + width), visible_BL=visible_BL)
            metrics = compare_predictions(reference.head, full_ND, logits_NV, rows, len(batch))
        metrics["commit_flips"] = commit_flips(before_BG, after_BG, ids_BL[:, width:].cpu(), watched.mask_id)
        masked_B = (before_BG == watched.mask_id).sum(1).tolist()
        for b in rows.unique().tolist():
            row = _row(batch[b], parts[b], step, masked_B[b])
            yield row | {metric: finite(value_B[b], metric, row) for metric, value_B in metrics.items()}


def _side_by_side(answers: Sequence[Tensor]) -> Tensor:
    """Return trajectories [S, G] as one batch [S, B, G]; one with fewer steps stays at its final answer."""
    most = max(map(len, answers))
    return torch.stack([torch.cat((a_SG, a_SG[-1:].expand(most - len(a_SG), -1))) for a_SG in answers], 1)


def _run_freely(
    model: MaskedDiffusionModel | MaskPredictor, config: Any, reference: Reference, batch: Sequence[int]
) -> Iterator[dict[str, Any]]:
    parts = [reference.prompts[i] for i in batch]
    ids_BP, visible_BP = left_padded([p.prompt for p in parts], padding_id(config))
    seeds = [p.seed for p in parts]
    out = generate(model, ids_BP, reference.sampler, attention_mask=visible_BP, seeds=seeds)
    differs_BG = out[:, ids_BP.shape[1] :].cpu() != torch.stack([p.answers_SG[-1] for p in parts])
    for b, index in enumerate(batch):
        flips = float(differs_BG[b].double().mean())
        yield _row(index, parts[b], None, None) | {"answer_flips": flips, "same_answer": float(flips == 0)}


def _row(index: int, prompt: PromptReference, step: int | None, masked: int | None) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(prompt.prompt).encode()).hexdigest()[:16]
    ratio = None if masked is None else masked / prompt.answers_SG.shape[1]
    return {"prompt": index, "doc_hash": digest, "step": step, "mask_ratio": ratio}
