"""Fisher weights in STaR-Quant: errors count by what they cost the likelihood of the model's own answers.

Rounding is per token and per output channel, so rows of a site times sqrt(w_t) and rows of a weight times sqrt(v_o) are
rounded to the same codes, and the squared error of their product is the weighted one. Weights are fitted once, kept as
a part of what was fitted, and read block by block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates
from starquant.calibration.fisher import BlockFisher, fisher_weights
from starquant.calibration.walk import BlockVisit
from starquant.config.methods.star_quant import STaRQuantOptions
from starquant.methods.blockwise import Tensors
from starquant.methods.fitted import Fitted
from starquant.methods.scaling import scale_names
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import BlockSites, LinearKey, Role, Site, SiteKey
from starquant.session.progress import SILENT, Progress

FLOOR = 0.01  # of a weight, as a share of their mean; our choice


def fisher_part(index: int) -> str:
    """Return the name of the part that holds a block's weights."""
    return f"fisher_{index:03d}"


def fit_fisher(
    model: MaskedDiffusionModel, states: CalibrationStates, fitted: Fitted, progress: Progress = SILENT
) -> None:
    """Fit the weights of all blocks, unless they are there; raises as `fisher_weights`."""
    blocks = len(model.trunk().blocks)
    if fisher_part(blocks - 1) in fitted:
        return
    for index, weights in enumerate(fisher_weights(model, states, progress=progress)):
        fitted.put(fisher_part(index), _tensors_of(weights))


def _tensors_of(weights: BlockFisher) -> Tensors:
    tensors = {f"{role.value}.outputs": weight_O.float() for role, weight_O in weights.outputs.items()}
    for site, of_batches in weights.tokens.items():
        tensors |= {f"{site.value}.tokens.{number:05d}": weight_BL for number, weight_BL in enumerate(of_batches)}
    return tensors


def token_weights(sites: BlockSites, tensors: Tensors, visible: Sequence[Tensor]) -> dict[SiteKey, list[Tensor]]:
    """Return sqrt(w_t) of every site and batch [B, L], the mean of w 1 over visible tokens, none below a floor.

    Args:
        sites: of the block.
        tensors: of its part.
        visible: of every batch, False on padding [B, L].
    """
    by_site: dict[SiteKey, list[Tensor]] = {}
    for site in sites.inputs:
        names = sorted(name for name in tensors if name.startswith(f"{site.value}.tokens."))
        if not names:
            continue
        squares = [tensors[name].double() for name in names]
        mean = torch.cat([x[shown] for x, shown in zip(squares, visible, strict=True)]).mean()
        if float(mean) > 0:
            by_site[site] = [((x / mean + FLOOR) / (1 + FLOOR)).sqrt().float() for x in squares]
    return by_site


def output_weights(
    sites: BlockSites, tensors: Tensors, fitted: Tensors, options: STaRQuantOptions
) -> dict[LinearKey, Tensor]:
    """Return sqrt(v_o) of every linear as it is rewritten, [O], the mean of v 1 over the linears of a site.

    Outputs that a rotation mixes share their mean: value heads, and the residual stream where it is rotated. Those of
    an up projection are counted behind the scales that were folded into it.

    Args:
        sites: of the block.
        tensors: of its Fisher part.
        fitted: what was fitted of the block so far.
        options: of the method.
    """
    weights: dict[LinearKey, Tensor] = {}
    for role in sites.linears:
        if (weight_O := tensors.get(f"{role.value}.outputs")) is not None:
            weights[role] = _as_rewritten(sites, role, weight_O.double(), fitted, options)
    for site in sites.inputs:
        own = [role for role in sites.readers(site) if role in weights]
        mean = torch.cat([weights[role] for role in own]).mean() if own else torch.zeros(())
        for role in own:
            scaled = weights[role] / mean if float(mean) > 0 else torch.ones_like(weights[role])
            weights[role] = ((scaled + FLOOR) / (1 + FLOOR)).sqrt()
    return weights


def _as_rewritten(
    sites: BlockSites, role: LinearKey, weight_O: Tensor, fitted: Tensors, options: STaRQuantOptions
) -> Tensor:
    if role is Role.V and options.head_hadamard:
        heads = weight_O.unflatten(0, (sites.attention.n_kv_heads, -1))
        shared_O: Tensor = heads.mean(1, keepdim=True).expand_as(heads).flatten()
        return shared_O
    if role.kind in (Role.OUT, Role.DOWN) and options.residual_rotation != "none":
        return weight_O.mean().expand_as(weight_O)
    scale_D = fitted.get(scale_names(Site.DOWN)) if role is Role.UP else None
    return weight_O if scale_D is None else weight_O * scale_D.to(weight_O).square()


def weigh_visit(visit: BlockVisit, tensors: Tensors) -> None:
    """Let a visit's weighted statistics use the Fisher weights of its tokens."""
    visible = [batch.visible_BL for batch in visit.states.batches]
    visit.token_weights = token_weights(visit.sites, tensors, visible)
