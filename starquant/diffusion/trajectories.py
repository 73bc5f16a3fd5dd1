"""Real denoising trajectories: the states a sampler passes through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from starquant.diffusion.generation import generate
from starquant.diffusion.predictor import MaskPredictor
from starquant.diffusion.samplers import Sampler


@dataclass(frozen=True)
class Trajectory:
    """A batch's states along its denoising, on the CPU.

    Attributes:
        ids_SBL: state before each step, and the final one: S = steps + 1.
        prompt_length: columns of the prompt (padding on the left included).
        visible_BL: False on padding.
        mask_id: id of [MASK].
        stepped_SB: which rows took the step behind each state but the final one; the others waited for them.
    """

    ids_SBL: Tensor
    prompt_length: int
    visible_BL: Tensor
    mask_id: int
    stepped_SB: Tensor


def record_trajectory(
    model: nn.Module | MaskPredictor,
    prompt_ids: Tensor,
    sampler: Sampler,
    *,
    attention_mask: Tensor | None = None,
    seed: int = 0,
) -> Trajectory:
    """Generate as `generate` does, and keep every state.

    Raises:
        ValueError: as `generate`.
    """
    predict = model if isinstance(model, MaskPredictor) else MaskPredictor(model)
    visible = torch.ones_like(prompt_ids) if attention_mask is None else attention_mask
    answer = prompt_ids.new_full((len(prompt_ids), sampler.answer_length), predict.mask_id)
    states, stepped = [torch.cat((prompt_ids, answer), dim=1).cpu()], list[Tensor]()

    def keep(step: int, ids_BL: Tensor, stepped_B: Tensor | None) -> None:
        states.append(ids_BL.to("cpu", copy=True))
        stepped.append(torch.ones(len(ids_BL), dtype=torch.bool) if stepped_B is None else stepped_B.cpu())

    generate(
        predict,
        prompt_ids,
        sampler,
        attention_mask=attention_mask,
        seed=seed,
        on_step=keep,
    )
    visible_BL = torch.cat((visible.bool().cpu(), torch.ones(answer.shape, dtype=torch.bool)), dim=1)
    return Trajectory(torch.stack(states), prompt_ids.shape[1], visible_BL, predict.mask_id, torch.stack(stepped))
