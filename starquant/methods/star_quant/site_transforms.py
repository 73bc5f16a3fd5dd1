"""STaR-Quant's transforms at the sites of a block: fitted, folded, put in place.

Tensors of a site are named SITE.factor_0 (and _1), SITE.gate, SITE.state_clip.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from starquant.calibration.site_statistics import SiteStatistics
from starquant.calibration.walk import BlockVisit
from starquant.config.bits import BitsSpec
from starquant.config.methods.star_quant import STaRQuantOptions, TACOptions, TransformOptions
from starquant.errors import DataError
from starquant.methods.blockwise import Tensors
from starquant.methods.fitted import Fitted
from starquant.methods.star_quant.balance import balanced_start
from starquant.methods.star_quant.base_transform import (
    DIVERGED,
    Group,
    Learned,
    Transform,
    divergence_named,
    output_errors,
)
from starquant.methods.star_quant.learned_transform import Watch, learn
from starquant.methods.star_quant.sgat import Gate, closed_form, closed_form_of_rows, gate_of
from starquant.methods.star_quant.start import start_of
from starquant.methods.star_quant.tac import MATRIX, SHIFT
from starquant.models.roles import BlockSites, LinearKey, Role, Site, SiteKey
from starquant.numerics import States, apply_kronecker, dual
from starquant.numerics.token_states import of_groups
from starquant.quantized import (
    BlockAffine,
    InvertibleKronecker,
    InvertibleTransform,
    KroneckerTransform,
    OrthogonalTransform,
    SiteTransform,
    StateGate,
    rewriting,
    transform_values,
)
from starquant.quantized.install import activation_format, weight_format

NO_WEIGHTS: Mapping[LinearKey, Tensor] = {}


def fit_site(
    visit: BlockVisit,
    site: SiteKey,
    statistics: SiteStatistics | None,
    bits: BitsSpec,
    options: STaRQuantOptions,
    fitted: Fitted,
    outputs: Mapping[LinearKey, Tensor] = NO_WEIGHTS,
) -> Tensors:
    """Return the tensors of one site, and report how they came about.

    Args:
        visit: the block, rewritten up to the site.
        site: whose linears are transformed.
        statistics: rows (and second moments) of the site; None where nothing needs them.
        bits: grids.
        options: of the method.
        fitted: takes the report.
        outputs: what the outputs of linears are multiplied by in the error, [O].
    """
    width = visit.sites.width(site)
    gate = planned_gate(options, site, visit.index, width, bits)
    if gate.acts and options.transform.fit == "fixed":
        fitted.note("gates on a fixed rotation drop directions that carry as much as any other", "all blocks")
    row: dict[str, Any] = {"block": visit.index, "site": site.value, "width": width}
    tensors: Tensors = {}
    if statistics is not None and statistics.empty:
        fitted.report.append(row | {"structure": "none", "d_m": 0, "d_u": 0, "why": "no statistics"})
        return {}
    if statistics is not None:
        rotation, structure = start_of(visit.sites, site, options, fitted)
        if gate.acts and options.transform.fit == "closed_form" and structure == "kronecker":
            row |= _fallback(site, width, rotation, options, fitted)
            gate = gate.in_runs(len(rotation[1]))
        trained, judged = groups_of(visit, site, statistics, bits, options, gate, outputs)
        start = _start(trained, rotation, structure, statistics, options.transform)
        learned = _fit(trained, start, structure, options, visit, site)
        row |= _training_errors(trained, learned)
        gate, errors = _chosen_gate(judged, start, learned, gate, options, f"{visit.name} {site.value}", fitted)
        if structure != "fixed":
            tensors |= {f"{site.value}.factor_{i}": factor for i, factor in enumerate(learned.transform.factors)}
        if learned.state_clip is not None:
            tensors[f"{site.value}.state_clip"] = _of_all_states(learned.state_clip.float(), trained, statistics.states)
            row |= _by_state("clip", trained, map(float, learned.state_clip))
        row |= {"structure": structure} | errors
    if gate.acts:
        tensors[f"{site.value}.gate"] = torch.tensor(gate.widths)
    fitted.report.append(row | {"d_m": gate.d_m, "d_u": gate.d_u, "why": gate.why})
    return tensors


def _fallback(
    site: SiteKey, width: int, start: Sequence[Tensor], options: STaRQuantOptions, fitted: Fitted
) -> dict[str, str]:
    """Note and return what stands in place of a dense closed form; nothing where a Kronecker product is wanted."""
    if options.transform.structure == "kronecker":
        return {}
    sizes = f"{len(start[0])} x {len(start[1])}"
    limit = options.transform.dense_width
    what = f"closed form of the first Kronecker factor ({sizes}): wider than dense_width={limit}"
    fitted.note(what, site.value, width=width)
    return {"fallback": what}


def _training_errors(group: Group, learned: Learned) -> dict[str, float]:
    """Return the output errors on the rows that P was learned on: below those on other rows where P is overfit."""
    errors = output_errors(group, learned.transform, learned.state_clip)
    return _by_state("training_error", group, errors)


def _by_state(name: str, group: Group, numbers: Iterable[float]) -> dict[str, float]:
    """Return the numbers of each token state under names for the report."""
    return {f"{name}_{state.value}": number for state, number in zip(group.states, numbers, strict=True)}


def _of_all_states(clip_S: Tensor, group: Group, states: States) -> Tensor:
    """Return clip ratios of all states that the model declares: what was not learned from has the one in front's."""
    learned = dict(zip(group.states, clip_S, strict=True))
    ratios: list[Tensor] = []
    for state in states:
        ratios.append(learned.get(state, ratios[-1] if ratios else clip_S[0]))
    return torch.stack(ratios)


def _chosen_gate(
    group: Group,
    start: Transform,
    learned: Learned,
    gate: Gate,
    options: STaRQuantOptions,
    where: str,
    fitted: Fitted,
) -> tuple[Gate, dict[str, float]]:
    """Return the gate that is kept, and output errors at the start and in the end; notes what went wrong."""
    ungated = dataclasses.replace(group, gate=(0, 0))
    at_start = output_errors(ungated, start.to(group.weights[0].float()), None)
    after = output_errors(group, learned.transform, learned.state_clip)
    if not all(math.isfinite(error) for error in after):
        raise DataError(f"{where}: {DIVERGED}")
    if options.sgat.keep == "if_better" and gate.acts:
        without = output_errors(ungated, learned.transform, learned.state_clip)
        if sum(without) <= sum(after):
            gate = Gate(0, 0, f"not better: error {sum(after):.3g} with, {sum(without):.3g} without")
            after = without
    if sum(after) > sum(at_start):
        fitted.note("output error above that of the start", where)
    return gate, _by_state("start_error", group, at_start) | _by_state("error", group, after)


def planned_gate(options: STaRQuantOptions, site: SiteKey, block: int, width: int, bits: BitsSpec) -> Gate:
    """Return the gate that the options put at a site, none where it cannot act."""
    if bits.activations.bits == 16:
        return Gate(0, 0, "bits.activations.bits = 16")
    transform = options.transform
    if transform.fit == "closed_form" and transform.structure == "shared" and site.kind in (Site.OUT, Site.DOWN):
        return Gate(0, 0, "behind no norm: not part of the shared closed form")
    return gate_of(options.sgat, site, block, width)


def groups_of(
    visit: BlockVisit,
    site: SiteKey,
    statistics: SiteStatistics,
    bits: BitsSpec,
    options: STaRQuantOptions,
    gate: Gate,
    outputs: Mapping[LinearKey, Tensor] = NO_WEIGHTS,
) -> tuple[Group, Group]:
    """Return the group with rows to learn from, and with rows to be judged on."""
    readers = visit.sites.readers(site)
    weights = [linear.weight.data for linear in readers.values()]
    if outputs:
        of_readers = [outputs.get(role) for role in readers]
        weights = [w if v_O is None else w * v_O.to(w)[:, None] for w, v_O in zip(weights, of_readers, strict=True)]
    states = statistics.learned_states()
    rows = [statistics.rows(state).to(weights[0]) for state in states]
    grids, clips = (weight_format(bits.weights), activation_format(bits.activations)), options.weights.mse_clip
    trained, judged = (
        Group(weights, tuple([x[i::2] for x in rows]), *grids, gate.widths, clips, states) for i in (0, 1)
    )
    return trained, judged


def _start(
    group: Group, start: list[Tensor], structure: str, statistics: SiteStatistics, transform: TransformOptions
) -> Transform:
    """Return what P starts from, in float64: the rotation, a closed form, or a rotation behind a balancing map."""
    if transform.balance and group.rounds and structure != "fixed":
        seen = [statistics.second_moment(state) for state in group.states] if structure == "dense" else None
        return balanced_start(group, start, seen)
    if structure == "dense" and transform.reads_moments(len(start[0])):
        moments = [statistics.second_moment(states).mean.cpu() for states in of_groups(group.states)]
        masked, unmasked = (start[0].T @ moment @ start[0] for moment in moments)
        start = [start[0] @ closed_form(masked, unmasked, group.gate)]
    if structure == "kronecker" and transform.fit == "closed_form" and any(group.gate):
        rows = [apply_kronecker(x.double().cpu(), *start).unflatten(1, (len(start[0]), -1)) for x in group.rows_SND]
        start = [start[0] @ closed_form_of_rows(rows[0], torch.cat(rows[1:]), group.gate), start[1]]
    return Transform(start)


def _fit(
    group: Group, start: Transform, structure: str, options: STaRQuantOptions, visit: BlockVisit, site: SiteKey
) -> Learned:
    transform, watch = options.transform, Watch(visit.progress, site.value, visit.index)
    if structure != "fixed" and transform.fit == "learned" and group.rounds:
        with divergence_named(f"{visit.name} {site.value}"):
            return learn(group, start, transform, watch=watch)
    if transform.state_clip and group.activation_format.quantizes:
        return learn(group, start, transform, rotate=False, watch=watch)
    return Learned(start.to(group.weights[0].float()), None)


def rewrite_sites(sites: BlockSites, tensors: Tensors, invertible: bool = False) -> None:
    """Fold each site's matrix into the linears that read it, and put it there.

    P^-T is of P as it is stored; of an orthogonal P it is P itself.
    """
    for site in sites.inputs:
        readers = list(sites.readers(site).values())
        names = [name for name in (f"{site.value}.factor_{i}" for i in (0, 1)) if name in tensors]
        if not names:
            continue
        device = readers[0].weight.device
        factors = [tensors[name].to(device) for name in names]
        exact = [dual(factor) if invertible else factor.double() for factor in factors]
        rewriting.transform_input(readers, Transform(exact))
        dense, kronecker = (
            (InvertibleTransform, InvertibleKronecker) if invertible else (OrthogonalTransform, KroneckerTransform)
        )
        sites.inputs[site].transform = (dense if len(factors) == 1 else kronecker)(*factors)


def compensate_sites(sites: BlockSites, tensors: Tensors, bits: BitsSpec, options: TACOptions) -> None:
    """Put gates and clip ratios at the sites and TAC behind the attention, each where something is quantized."""
    device = sites.linears[Role.OUT].weight.device
    for site, module in sites.inputs.items():
        width = sites.width(site)
        gate, clip = tensors.get(f"{site.value}.gate"), tensors.get(f"{site.value}.state_clip")
        placed = module.transform
        exact = placed.exact if isinstance(placed, SiteTransform) else placed
        gating = None if gate is None or bits.activations.bits == 16 else StateGate(width, *gate.tolist()).to(device)
        correction = _correction(sites, tensors, options) if site is Site.OUT else None
        module.state_clip = None if clip is None else clip.to(device)
        if gating is not None or correction is not None:
            module.transform = SiteTransform(exact, correction, gating)


def keep_exact_part(sites: BlockSites, site: SiteKey) -> None:
    """Take gate and correction away from a site again."""
    module = sites.inputs[site]
    if isinstance(module.transform, SiteTransform):
        module.transform = module.transform.exact


def _correction(sites: BlockSites, tensors: Tensors, options: TACOptions) -> nn.Module | None:
    """Return TAC for the attention output, or put it on the values and return None."""
    if MATRIX not in tensors:
        return None
    device = sites.linears[Role.OUT].weight.device
    matrix, shift = tensors[MATRIX].to(device), tensors[SHIFT].to(device)
    if options.placement == "output":
        return BlockAffine(matrix, shift)
    attention = sites.attention
    groups, blocks = attention.n_kv_heads, attention.head_dim // matrix.shape[-1]

    def first_of_group(x: Tensor) -> Tensor:
        grouped: Tensor = x.unflatten(1, (groups, -1, blocks))
        return grouped[:, :, 0].flatten(1, 2)

    transform_values(attention, BlockAffine(first_of_group(matrix), first_of_group(shift)))
    return None
