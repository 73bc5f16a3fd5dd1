"""Random quantized models as methods leave them at run time: their speed and memory do not depend on the numbers.

A variant is a precision and what stands in front of its linears:

    bf16            nothing is quantized
    w4a4, w8a8      STaR-Quant as `run.py` leaves it at 8B: Kronecker P, gates, TAC, clip ratios by token state
    w4a4-no-gates   the same without gates; w4a4-no-tac without TAC: what each costs
    w4a4-shared     P folded at the two sites behind a norm (structure=shared), Kronecker at the others
    w4a4-quarot     QuaRot: Hadamards across heads and before the down-projection
    w4a4-plus       STaR-Quant+: Kronecker P, TAC of 64 channels by token state, zero points of inputs, no gates
    w4a4-plain      nothing in front (round to nearest): what all of it costs
    w4a4-asym       the same with zero points on both sides of a product; w4a4-asym-in of inputs only
    w4a16           weights only
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from evaluation import model_of

from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Site
from starquant.numerics import kronecker_sizes
from starquant.packed.description import rebuild, use_integers

TAC_BLOCK, GATE = 16, 1 / 32  # g and d_m = d_u of the paper's main setting


@dataclass(frozen=True)
class Variant:
    """Bits of weights and inputs, P ("kronecker", "shared", "hadamard", "none"), gates, TAC.

    Attributes:
        symmetric: grids of weights and inputs.
        conditions: maps of TAC, 1 or one a token state.
        block: channels of a map.
    """

    weights: int
    inputs: int
    transform: str = "none"
    gates: bool = False
    tac: bool = False
    symmetric: tuple[bool, bool] = (True, True)
    conditions: int = 1
    block: int = TAC_BLOCK


VARIANTS = {
    "bf16": Variant(16, 16),
    "w4a4": Variant(4, 4, "kronecker", gates=True, tac=True),
    "w4a4-no-gates": Variant(4, 4, "kronecker", tac=True),
    "w4a4-no-tac": Variant(4, 4, "kronecker", gates=True),
    "w4a4-shared": Variant(4, 4, "shared", gates=True, tac=True),
    "w4a4-quarot": Variant(4, 4, "hadamard"),
    "w4a4-plus": Variant(4, 4, "kronecker", tac=True, symmetric=(True, False), conditions=2, block=64),
    "w4a4-plain": Variant(4, 4),
    "w4a4-asym": Variant(4, 4, symmetric=(False, False)),
    "w4a4-asym-in": Variant(4, 4, symmetric=(True, False)),
    "w8a8": Variant(8, 8, "kronecker", gates=True, tac=True),
    "w4a16": Variant(4, 16),
}


def build(
    family: str, shape: str, name: str, device: str, ends: int = 8, layers: int | None = None
) -> MaskedDiffusionModel:
    """Return a random model of a variant, its memory that of what is kept; embedding and head have `ends` bits.

    `layers` are the blocks; None for as many as the shape has.
    """
    variant = VARIANTS[name]
    if variant.weights == 16:
        model = model_of(family, shape, device, layers)
        use_integers(model)  # nothing is an integer; queries and keys are turned in one pass as those of the others
        return model
    model = model_of(family, shape, "meta", layers)
    rebuild(model, described(model, variant, ends))
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dtype == torch.uint8:
                tensor.random_(0, 256, generator=generator)
            elif key.endswith("scale"):
                tensor.fill_(1e-3)
            elif key.endswith("zero"):
                tensor.random_(0, 1 << variant.weights, generator=generator)
            elif key.endswith("state_clip"):
                tensor.fill_(0.9)
            else:
                tensor.normal_(std=0.02, generator=generator)
    use_integers(model)
    return model.eval()


def described(model: MaskedDiffusionModel, variant: Variant, ends: int) -> dict[str, Any]:
    """Return quantization_config.modules of a model that is quantized throughout."""
    modules: dict[str, Any] = {}
    grid = {"bits": variant.inputs, "symmetric": variant.symmetric[1], "clip_ratio": 1.0}
    heads = model.config.num_attention_heads
    packed = {"bits": variant.weights, "symmetric": variant.symmetric[0], "group_size": None}
    for info in model.linears().values():
        modules[info.name] = {"kind": "packed_linear", **packed, "bias": info.module.bias is not None}
        transform = transform_at(info.role.site, info.module.in_features, heads, variant)
        site = {"kind": "site", "grid": grid if variant.inputs < 16 else None, "transform": transform}
        modules[info.site] = site | {"state_clip": variant.transform in ("kronecker", "shared")}
    if ends < 16:
        names, table = (
            {module: name for name, module in model.named_modules()},
            packed | {"bits": ends, "symmetric": True},
        )
        modules[names[model.trunk().embedding]] = {"kind": "packed_embedding", **table}
        modules[names[model.trunk().head]] = {"kind": "packed_linear", **table, "bias": False}
    return modules


def transform_at(site: Site, width: int, heads: int, variant: Variant) -> dict[str, Any] | None:
    """Return what stands at a site."""
    if variant.transform == "none":
        return None
    cut, description = round(GATE * width), dict[str, Any]({"kind": "site_transform"})
    description |= dict.fromkeys(("exact", "correction", "gate"))
    if variant.gates:
        description["gate"] = {"kind": "state_gate", "width": width, "d_m": cut, "d_u": cut}
    if variant.tac and site is Site.OUT:
        shape = [variant.conditions, width // variant.block, variant.block]
        description["correction"] = {"kind": "block_affine", "shape": shape}
    behind_norm = site in (Site.QKV, Site.GATE_UP)
    if variant.transform == "kronecker" or (variant.transform == "shared" and not behind_norm):
        description["exact"] = dict(zip(("a", "b"), kronecker_sizes(width), strict=True)) | {"kind": "kronecker"}
    elif variant.transform == "hadamard" and site is Site.OUT:
        description["exact"] = {"kind": "heads_hadamard", "heads": heads}
    elif variant.transform == "hadamard" and site is Site.DOWN:
        description["exact"] = {"kind": "hadamard", "width": width}
    return description
