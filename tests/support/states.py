"""Calibration states, and what linears read on them."""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates, StateBatch
from starquant.calibration.masked_states import make_states
from starquant.calibration.segments import read_segments
from starquant.config.calibration import CalibrationSpec, SourceSpec, StatesSpec
from starquant.diffusion import LLaDASampler
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Site


def states_of(model: MaskedDiffusionModel) -> CalibrationStates:
    """Three batches at every mask ratio, one of them padded."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for k in range(3):
        ids = torch.randint(0, model.mask_token_id - 2, (4, 20), generator=generator)
        ratio = torch.tensor([0.1, 0.4, 0.7, 1.0])
        masked = torch.rand(ids.shape, generator=generator) < ratio[:, None]
        visible = torch.ones_like(masked)
        visible[: k % 2, -6:] = False
        share = (masked & visible).sum(1) / visible.sum(1)
        batches.append(StateBatch(ids.masked_fill(masked, model.mask_token_id), visible, share))
    return CalibrationStates(batches, model.mask_token_id, bins=4)


def partly_masked(model: MaskedDiffusionModel, bins: int = 4, inputs: str = "full_precision") -> CalibrationStates:
    """Three batches with mask ratios from 0 to 1, the second padded on the left, the third on the right."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for k in range(3):
        drawn = torch.randint(0, 190, (4, 18), generator=generator)
        ids = drawn + (drawn == model.mask_token_id)
        masked = torch.rand(ids.shape, generator=generator) < torch.tensor([0.0, 0.3, 0.6, 1.0])[:, None]
        visible = torch.ones_like(masked)
        if k:
            visible[1, :5] = visible[3, -7:] = False
        ratio = (masked & visible).sum(1).double() / visible.sum(1)
        weight = torch.rand(ids.shape, generator=generator) + 0.5
        batches.append(StateBatch(ids.masked_fill(masked, model.mask_token_id), visible, ratio, weight))
    return CalibrationStates(batches, model.mask_token_id, bins=bins, inputs=inputs)


def tiny_states(tiny: MaskedDiffusionModel, tokenizer: object, split: str, segments: int) -> CalibrationStates:
    """States of the embedded model's own items."""
    source = SourceSpec(kind="testbed", split=split, segments=segments, length=64)
    spec = CalibrationSpec(name="test", source=source, states=StatesSpec(sampler="uniform"))
    found = read_segments(source, tokenizer, tiny.config.context_length, seed=0)
    return make_states(found, spec, tiny, LLaDASampler(steps=8, gen_length=8, block_length=8))


def inputs_of(model: MaskedDiffusionModel, states: CalibrationStates) -> dict[str, Tensor]:
    """What every linear reads at visible tokens [N, D] in float64, by plain forward passes."""
    found: dict[str, list[Tensor]] = {name: [] for name in model.linears()}
    for batch in states.batches:
        handles = [
            info.module.register_forward_pre_hook(
                lambda _, args, n=name, b=batch: found[n].append(args[0][b.visible_BL].double())
            )
            for name, info in model.linears().items()
        ]
        with torch.no_grad():
            model(batch.ids_BL, attention_mask=batch.visible_BL)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def site_inputs(model: MaskedDiffusionModel, inputs: dict[str, Tensor], block: int, site: Site) -> Tensor:
    """What the linears of one site read [N, D]."""
    name = next(n for n, i in model.linears().items() if i.block == block and i.role.site is site)
    return inputs[name]
