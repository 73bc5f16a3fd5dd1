"""Weight solvers, shared by all methods: round to nearest, or GPTQ (arXiv 2210.17323), with or without clipping."""

from __future__ import annotations

import itertools

from torch import Tensor

from starquant.calibration.site_statistics import Collect
from starquant.calibration.walk import BlockVisit
from starquant.config.bits import BitsSpec
from starquant.config.methods.base import WeightSolverOptions
from starquant.errors import RecordError
from starquant.methods.fitted import Fitted, block_part
from starquant.methods.propagation import moments_of_moved_inputs
from starquant.models.roles import LinearInfo, Site, SiteKey
from starquant.numerics import QuantFormat, Quantized, gptq, mse_clip, quantize
from starquant.numerics.gptq import Factor, factorize, made_up
from starquant.quantized.install import (
    WeightSolver,
    activation_format,
    quantize_attention,
    quantize_linear,
    weight_format,
)


def solve_block(
    visit: BlockVisit, bits: BitsSpec, options: WeightSolverOptions, fitted: Fitted, weighted: bool = False
) -> dict[str, Tensor]:
    """Return GPTQ's codes and scales of every linear of a block, by role.

    When blocks are fed quantized inputs, the sites are solved one after another, each on what the quantized part of
    the block in front of it gives ("true sequential"); otherwise all at once.

    Args:
        visit: the block, already rewritten by the method.
        bits: grids.
        options: the solver's.
        fitted: takes notes of raised damping and dead inputs.
        weighted: use the states' token weights in the Hessian.

    Raises:
        DataError: a Hessian that stays singular, activations that are not finite.
    """
    if not visit.feeds_quantized:
        return solve_sites(visit, tuple(visit.sites.inputs), bits, options, fitted, weighted)
    tensors: dict[str, Tensor] = {}
    for _, sites in itertools.groupby(visit.sites.inputs, key=lambda site: site.kind):  # experts stand side by side
        tensors |= solve_sites(visit, tuple(sites), bits, options, fitted, weighted)
    return tensors


def solve_sites(
    visit: BlockVisit,
    sites: tuple[SiteKey, ...],
    bits: BitsSpec,
    options: WeightSolverOptions,
    fitted: Fitted,
    weighted: bool = False,
) -> dict[str, Tensor]:
    """Solve the linears of some sites, as `solve_block`; when fed quantized inputs, they are then installed.

    Experts that read one input share its Hessian; a down projection without statistics is rounded to nearest.
    """
    propagated = {site for site in sites if isinstance(site, Site)} if options.propagation else set()
    plan = Collect(moments=False, second_moment="pooled", weighted=weighted)
    collected = visit.collect(plan, [site for site in sites if site not in propagated])
    tensors: dict[str, Tensor] = {}
    fmt = weight_format(bits.weights)
    for site in sites:
        second_II: Tensor | None
        moved_II: Tensor | None = None
        if site in propagated:
            second_II, moved_II = moments_of_moved_inputs(visit, site, activation_format(bits.activations), weighted)
        else:
            seen = collected.pop(site)
            second_II = None if seen.empty else seen.second_moment().total
            del seen
        factor = None if second_II is None else _factor_of(second_II, visit, options)
        del second_II  # it goes before the weights are solved
        for info in visit.linears.values():
            if info.role.site != site:
                continue
            quantized = _solve(info, factor, fmt, bits, options, fitted, moved_II)
            tensors |= quantized.to_tensors(info.role.value)
            if visit.feeds_quantized:
                quantize_linear(visit.model, visit.block, info, bits, lambda *_, q=quantized: q)
    if visit.feeds_quantized and sites == (Site.QKV,):  # what the output projection reads passes through the operands
        quantize_attention(visit.model, visit.block, visit.index, bits.attention)
    return tensors


def _factor_of(second_II: Tensor, visit: BlockVisit, options: WeightSolverOptions) -> Factor:
    device = visit.model.device
    return factorize(second_II, percdamp=options.percdamp, act_order=options.act_order, device=device)


def _solve(
    info: LinearInfo,
    factor: Factor | None,
    fmt: QuantFormat,
    bits: BitsSpec,
    options: WeightSolverOptions,
    fitted: Fitted,
    moved_II: Tensor | None = None,
) -> Quantized:
    """Return GPTQ's codes of one linear, and note what was out of the ordinary."""
    weight = info.module.weight.data
    if factor is None:
        return quantize(weight, fmt, clip=_clip(weight, bits, options))
    if moved_II is not None:
        weight = made_up(weight, factor, moved_II, options.propagation)
    result = gptq(weight, factor, fmt, block_size=options.block_size, clip=_clip(weight, bits, options))
    if result.damping > options.percdamp:
        fitted.note("damping raised", info.name, damping=result.damping)
    if result.dead:
        fitted.note("dead inputs, weights set to zero", info.name, count=result.dead)
    return result.quantized


def stored_weights(fitted: Fitted, bits: BitsSpec, options: WeightSolverOptions) -> WeightSolver:
    """Return the solver that `apply` installs: solved codes where there are some, else rounding with stored clips."""
    cache: dict[int, dict[str, Tensor]] = {}

    def solve(info: LinearInfo, fmt: QuantFormat) -> Quantized:
        if info.block not in cache:
            cache.clear()  # one block's tensors in memory
            cache[info.block] = fitted.get(block_part(info.block))
        return solver_of(cache[info.block], bits, options)(info, fmt)

    return solve


def solver_of(tensors: dict[str, Tensor], bits: BitsSpec, options: WeightSolverOptions) -> WeightSolver:
    """Return the solver of one block's tensors, as `stored_weights`."""

    def solve(info: LinearInfo, fmt: QuantFormat) -> Quantized:
        weight, role = info.module.weight.data, info.role.value
        if f"{role}.codes" in tensors:
            return Quantized.from_tensors(tensors, role, fmt, weight.shape).to(weight.device)
        if options.name == "gptq":
            raise RecordError(f"{info.name}: what was fitted holds no GPTQ codes for it; fit on this model")
        clip = tensors.get(f"{role}.clip")
        if clip is None:
            clip = _clip(weight, bits, options)
        return quantize(weight, fmt, clip=None if clip is None else clip.to(weight.device))

    return solve


def _clip(weight: Tensor, bits: BitsSpec, options: WeightSolverOptions) -> Tensor | None:
    return mse_clip(weight, weight_format(bits.weights)) if options.mse_clip else None
