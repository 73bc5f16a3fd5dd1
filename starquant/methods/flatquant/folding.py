"""What FlatQuant learned of a block as tensors, folded into the block exactly; clip ratios put where something rounds.

Tensors are SITE.factor_0 (and _1), SITE.channel, SITE.clip, SITE.gate; values.matrix, keys.matrix, operands.clip; and
ROLE.ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from starquant.config.bits import BitsSpec
from starquant.methods.flatquant.parameters import BlockParameters
from starquant.methods.scaling import producer
from starquant.models.roles import BlockSites, LinearKey, Role, Site, SiteKey
from starquant.numerics import apply_kronecker, dual
from starquant.quantized import (
    InvertibleKronecker,
    KeyTransform,
    SiteTransform,
    StateGate,
    rewriting,
    set_operand_clips,
)
from starquant.quantized.attention import transform_queries_and_keys

Tensors = dict[str, Tensor]
VALUES, KEYS, OPERANDS = "values.matrix", "keys.matrix", "operands.clip"


@torch.no_grad()
def tensors_of(learned: BlockParameters, sites: BlockSites) -> Tensors:
    """Return what was learned: matrices in float32, composed in float64; ratios; where weight rows are cut.

    Args:
        learned: of the block.
        sites: of the block at full precision.
    """
    learned.renew(torch.float64)
    tensors: Tensors = {VALUES: learned.now_values.matrix}
    if learned.now_keys is not None:
        tensors[KEYS] = learned.now_keys.matrix
    if learned.operand_clip_OE is not None:
        tensors[OPERANDS] = learned.operand_clip_OE.sigmoid()
    for site, part in learned.sites.items():
        left, right = learned.now[site]
        factors = (left,) if right is None else (left, right)
        tensors |= {f"{site.value}.factor_{i}": factor.matrix for i, factor in enumerate(factors)}
        if part.channel_D is not None:
            tensors[f"{site.value}.channel"] = part.channel_D
        if part.clip_E is not None:
            tensors[f"{site.value}.clip"] = part.clip_E.sigmoid()
    for role in learned.row_clips:
        weight_OI = learned.unclipped(role, sites.linears[role].weight.double())
        tensors[f"{role.value}.ends"] = torch.cat(learned.ends(role, weight_OI), 1)
    learned.renew()
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for site in sites.inputs:  # rows of what is in front of a down projection are scaled with its channels
        channel_D, made_by = tensors.get(f"{site.value}.channel"), _maker(sites, site)
        if channel_D is not None and made_by is not None and f"{made_by.value}.ends" in tensors:
            ends_O2 = tensors[f"{made_by.value}.ends"] * channel_D[:, None]
            tensors[f"{made_by.value}.ends"] = torch.stack((ends_O2.amax(1), ends_O2.amin(1)), 1)
    return tensors


def _maker(sites: BlockSites, site: SiteKey) -> LinearKey | None:
    """Return the up projection in front of a down projection; None for another site."""
    return next(iter(sites.readers(site))).beside(Role.UP) if site.kind is Site.DOWN else None


def rewrite_block(sites: BlockSites, tensors: Tensors) -> None:
    """Fold all transforms into the linears and norms of a block, exactly, and put what runs online at its sites."""
    with rewriting.rounded_once(sites):
        for site in sites.inputs:
            _fold_site(sites, site, tensors)
        value, values_EE = sites.linears[Role.V], tensors[VALUES].to(sites.linears[Role.V].weight.device).double()
        rewriting.transform_output(value, lambda y: _within_heads(y, values_EE))
    if KEYS in tensors:
        keys_EE = tensors[KEYS].to(sites.linears[Role.K].weight.device)
        transform_queries_and_keys(sites.attention, KeyTransform.of(keys_EE))


def _fold_site(sites: BlockSites, site: SiteKey, tensors: Tensors) -> None:
    """Make a site's linears read (x * c) P, and let the norm or the up projection in front of it give x * c."""
    readers = list(sites.readers(site).values())
    device = readers[0].weight.device
    factors = [tensors[name].to(device) for name in _factors(site) if name in tensors]
    if (channel_D := tensors.get(f"{site.value}.channel")) is not None:
        scale_D = channel_D.to(device).double().reciprocal()
        rewriting.scale_input(readers, scale_D)
        if site in sites.norms:
            rewriting.divide_gain(producer(sites, site), scale_D)
        else:
            rewriting.divide_output(cast(nn.Linear, producer(sites, site)), scale_D)
    right = factors[1] if len(factors) == 2 else tensors[VALUES].to(device)
    left_dual, right_dual = dual(factors[0]), dual(right)
    rewriting.transform_input(readers, lambda w_nI: apply_kronecker(w_nI, left_dual, right_dual))
    sites.inputs[site].transform = InvertibleKronecker(factors[0], factors[1] if len(factors) == 2 else None)


def _factors(site: SiteKey) -> tuple[str, str]:
    return f"{site.value}.factor_0", f"{site.value}.factor_1"


def _within_heads(y: Tensor, matrix_EE: Tensor) -> Tensor:
    """Return y (I (x) V), [..., heads * E]."""
    mapped: Tensor = (y.unflatten(-1, (-1, len(matrix_EE))) @ matrix_EE).flatten(-2)
    return mapped


def gate_tensors(gates: Mapping[SiteKey, StateGate]) -> Tensors:
    """Return the widths (d_m, d_u) of gates, SITE.gate."""
    return {f"{site.value}.gate": torch.tensor((gate.d_m, gate.d_u)) for site, gate in gates.items()}


def gate_block(sites: BlockSites, tensors: Tensors, bits: BitsSpec) -> None:
    """Put gates behind the transforms of a rewritten block, where inputs are rounded; twice is once."""
    for site, module in sites.inputs.items() if bits.activations.bits < 16 else ():
        if (widths := tensors.get(f"{site.value}.gate")) is not None:
            placed, device = module.transform, next(iter(sites.readers(site).values())).weight.device
            exact = placed.exact if isinstance(placed, SiteTransform) else placed
            gate = StateGate(sites.width(site), *widths.tolist()).to(device)
            module.transform = SiteTransform(exact, gate=gate)


def clip_block(sites: BlockSites, tensors: Tensors, bits: BitsSpec) -> None:
    """Put clip ratios at the sites and the attention, and cut weight rows that no solver has put on their grid.

    Doing it again changes nothing.
    """
    for site, module in sites.inputs.items():
        if (clip_E := tensors.get(f"{site.value}.clip")) is not None:
            device = next(iter(sites.readers(site).values())).weight.device
            module.state_clip = clip_E.to(device).expand(len(sites.states), 2).contiguous()
    if OPERANDS in tensors:
        set_operand_clips(sites.attention, tensors[OPERANDS].to(sites.linears[Role.OUT].weight.device))
    if bits.weights.bits < 16:
        cut_weights(sites, tensors, [role for role in sites.linears if f"{role.value}.codes" not in tensors])


def cut_weights(sites: BlockSites, tensors: Tensors, roles: list[LinearKey]) -> None:
    """Cut the rows of rewritten weights at their learned ends: those of the values in front of V."""
    for role in roles:
        if (ends_O2 := tensors.get(f"{role.value}.ends")) is None:
            continue
        linear = sites.linears[role]
        ends_O2 = ends_O2.to(linear.weight)
        if role is not Role.V:
            with torch.no_grad():
                linear.weight.clamp_(ends_O2[:, 1:], ends_O2[:, :1])
            continue
        values_EE = tensors[VALUES].to(linear.weight.device).double()
        undone_EE, high_O, low_O = torch.linalg.inv(values_EE), ends_O2[:, 0].double(), ends_O2[:, 1].double()

        def cut(y_nO: Tensor, v_EE=values_EE, u_EE=undone_EE, high_O=high_O, low_O=low_O) -> Tensor:  # type: ignore[no-untyped-def]
            return _within_heads(_within_heads(y_nO, u_EE).clamp(low_O, high_O), v_EE)

        rewriting.map_columns(linear.weight, cut)
