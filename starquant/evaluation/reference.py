"""The full-precision side of fidelity: denoising trajectories, and what their predictions are recomputed from.

Shape suffixes: B batch, P prompt, G answer tokens, L = P + G, S states, N measured positions, D model width,
V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from starquant.diffusion import BatchSize, MaskPredictor, Sampler, generate
from starquant.diffusion.batch_size import in_batches
from starquant.diffusion.generation import left_padded
from starquant.diffusion.masking import seeded_generator
from starquant.diffusion.predictor import Cache
from starquant.diffusion.special_tokens import padding_id
from starquant.errors import CheckpointError, ConfigError, DataError
from starquant.evaluation.trajectory_metrics import measured_positions
from starquant.models.base import MaskedDiffusionModel
from starquant.numerics import all_finite
from starquant.session.progress import SILENT, Progress

R = TypeVar("R")


@dataclass(frozen=True)
class PromptReference:
    """One prompt's full-precision trajectory, on the CPU.

    Attributes:
        prompt: token ids.
        seed: of its sampling.
        answers_SG: the answer before each step, and the final one.
        residual: step -> residual stream before the last norm [N, D], where `measured_positions` says.
    """

    prompt: tuple[int, ...]
    seed: int
    answers_SG: Tensor
    residual: dict[int, Tensor]


@dataclass(frozen=True)
class Head:
    """What full precision's logits are recomputed from: a copy of the last norm and of the head."""

    norm: nn.Module
    weight_VD: Tensor

    @classmethod
    def of(cls, model: MaskedDiffusionModel) -> Head:
        """Copy a model's."""
        trunk = model.trunk()
        head: nn.Embedding | nn.Linear = trunk.embedding if trunk.head is None else trunk.head
        return cls(copy.deepcopy(trunk.norm), head.weight.detach().clone())

    @property
    def nbytes(self) -> int:
        """Memory of the head."""
        return self.weight_VD.nbytes

    def logits(self, residual_ND: Tensor) -> Tensor:
        """Return full-precision logits [N, V] from the residual stream."""
        logits: Tensor = nn.functional.linear(self.norm(residual_ND), self.weight_VD)
        return logits


@dataclass(frozen=True)
class Reference:
    """Full-precision trajectories, and what recomputes their logits."""

    prompts: tuple[PromptReference, ...]
    sampler: Sampler
    head: Head
    max_positions: int

    @property
    def nbytes(self) -> int:
        """Host memory of what is kept of the trajectories, and of the head."""
        tensors = [tensor for prompt in self.prompts for tensor in (prompt.answers_SG, *prompt.residual.values())]
        return self.head.nbytes + sum(tensor.nbytes for tensor in tensors)


class WatchedPredictor(MaskPredictor):
    """A mask predictor that keeps the last pass's residual stream (guidance: of its conditional branch)."""

    caches = False

    def _encode(
        self, ids_BL: Tensor, visible_BL: Tensor | None, cache: Cache | None, position_BL: Tensor | None = None
    ) -> Tensor:
        self._residual, self._visible = super()._encode(ids_BL, visible_BL, cache, position_BL), visible_BL
        return self._residual

    def watch(self, ids_BL: Tensor, visible_BL: Tensor | None, position_BL: Tensor | None = None) -> None:
        """Run a pass whose residual stream is then asked for; positions are None where they count up."""
        self._encode(ids_BL, visible_BL, None, position_BL)

    def hidden(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return (residual stream in the checkpoint's basis, after the last norm), [N, D], that predict positions."""
        rows, columns = rows.to(self.device), columns.to(self.device)
        at = rows, self.source_columns(rows, columns, self._visible)
        residual = self._residual[at]
        return self.model.original_basis(residual.float()).to(residual.dtype), self.model.trunk().norm(residual)


@torch.inference_mode()
def take_reference(
    model: MaskedDiffusionModel,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    batch_size: BatchSize,
    seed: int,
    max_positions: int = 64,
    progress: Progress = SILENT,
) -> Reference:
    """Generate at full precision and keep, for every state, what predictions are compared with.

    Host memory: at most max_positions * D values of the model's dtype for each prompt and step.

    Args:
        model: the full-precision model.
        prompts: token ids.
        sampler: of the trajectories.
        batch_size: prompts generated at a time; padded on the left.
        seed: of sampling; each prompt's own tokens are mixed in, as in `generate`.
        max_positions: masked positions measured a state; of more, evenly spaced ones stand for all.
        progress: draws a bar.

    Raises:
        DataError: no prompts, an empty prompt, a prompt that holds [MASK].
        ConfigError: prompt and answer do not fit the model.
        CheckpointError: hidden states that are not finite.
    """
    _validate_prompts(model, prompts, sampler)
    watched, references = WatchedPredictor(model), dict[int, PromptReference]()
    seeds = [seeded_generator(seed, "generation", prompt).initial_seed() for prompt in prompts]

    def record(batch: Sequence[int]) -> list[PromptReference]:
        chosen = [tuple(prompts[i]) for i in batch]
        return _record(watched, chosen, [seeds[i] for i in batch], sampler, max_positions)

    lengths = [len(prompt) + sampler.answer_length for prompt in prompts]
    for batch, recorded in by_length(lengths, batch_size, record, "reference", progress):
        references |= dict(zip(batch, recorded, strict=True))
    for index, prompt in references.items():
        if not all(map(all_finite, prompt.residual.values())):
            raise CheckpointError(f"fidelity: full-precision hidden states of prompt {index} are not finite")
    return Reference(tuple(references[i] for i in range(len(prompts))), sampler, Head.of(model), max_positions)


def _validate_prompts(model: MaskedDiffusionModel, prompts: Sequence[Sequence[int]], sampler: Sampler) -> None:
    if not prompts:
        raise DataError("fidelity.source: it gives no prompts")
    room = model.config.context_length - sampler.answer_length
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0 or model.mask_token_id in prompt:
            raise DataError(f"fidelity.source: prompt {index} is empty or holds [MASK]")
        if len(prompt) > room:
            raise ConfigError(
                f"fidelity.source.length: prompt {index} has {len(prompt)} tokens; with the {sampler.answer_length} of "
                f"the answer (model.trajectory) the model's {model.config.context_length} allow {max(room, 0)}"
            )


def _record(
    watched: WatchedPredictor, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], sampler: Sampler, most: int
) -> list[PromptReference]:
    ids_BP, visible_BP = left_padded(prompts, padding_id(watched.config))
    width, lengths_B = ids_BP.shape[1], visible_BP.sum(1)
    states = [torch.full((len(prompts), sampler.answer_length), watched.mask_id)]
    residual: list[dict[int, Tensor]] = [{} for _ in prompts]

    def keep(step: int, ids_BL: Tensor, stepped_B: Tensor | None) -> None:
        states.append(ids_BL[:, width:].to("cpu", copy=True))
        reach_BG = sampler.reach(states[-2], lengths_B, watched.mask_id)
        rows, columns = measured_positions(states[-2], states[-1], watched.mask_id, most, reach_BG)
        if len(rows):
            residual_ND = watched.hidden(rows, columns + width)[0].cpu()
            for row in rows.unique().tolist():
                residual[row][step] = residual_ND[rows == row]

    generate(watched, ids_BP, sampler, attention_mask=visible_BP, seeds=seeds, on_step=keep)
    answers_SBG = torch.stack(states)
    return [PromptReference(p, seeds[b], answers_SBG[:, b], residual[b]) for b, p in enumerate(prompts)]


def by_length(
    lengths: Sequence[int],
    size: BatchSize,
    work: Callable[[Sequence[int]], R],
    name: str,
    progress: Progress,
    unit: str = "prompt",
) -> Iterator[tuple[Sequence[int], R]]:
    """Yield indices of sequences of similar length, the longest first, with what `work` makes of them."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    with progress.bar(None, name, unit, total=len(order), counted=True) as bar:
        for batch, done in in_batches(order, lengths.__getitem__, size, work):
            yield batch, done
            bar.update(len(batch))
