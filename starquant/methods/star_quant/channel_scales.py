"""Scales of a site's native channels in front of P, in closed form.

Rounding x c P and W / c P costs about tr(C S C) tr(C^-1 H C^-1), C = diag(c), whatever the orthogonal P spreads evenly:
S is the second moment of x, each token state's divided by the energy of its outputs, H = W^T W. The least is at
c = (H_ii / S_ii)^(1/4). The scales fold into the norm, or the up projection, in front of the site, at no cost.

Shapes: N rows, D width of the site, O outputs of all linears that read it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.calibration.site_statistics import Collect, SiteStatistics
from starquant.calibration.walk import BlockVisit
from starquant.methods.blockwise import Tensors
from starquant.methods.scaling import scale_names
from starquant.models.roles import BlockSites, Site, SiteKey

DAMPING = 1e-3  # of both second moments, as a share of their mean; our choice
ROWS = 1024  # of each state, for the energy of its outputs


def fit_channel_scales(visit: BlockVisit) -> Tensors:
    """Return the scales of a block's sites that something in front can take.

    Scales are what the producer is divided by, as `methods.scaling` has them: 1 / c, their geometric mean 1.
    """
    wanted = [site for site in visit.sites.inputs if site in visit.sites.norms or site.kind is Site.DOWN]
    seen = visit.collect(Collect(rows=ROWS), wanted)
    return {scale_names(site): _scale(visit.sites, site, seen[site]) for site in wanted if not seen[site].empty}


def _scale(sites: BlockSites, site: SiteKey, statistics: SiteStatistics) -> Tensor:
    weight_OD = torch.cat([linear.weight.data.double() for linear in sites.readers(site).values()])
    second_D = torch.zeros(weight_OD.shape[1], dtype=torch.float64, device=weight_OD.device)
    for state in statistics.learned_states():
        output_NO = statistics.rows(state).double() @ weight_OD.T
        moments = statistics.moments(state)
        energy = output_NO.square().sum(1).mean().clamp_min(torch.finfo(torch.float32).tiny)
        second_D += (moments.mean.square() + moments.variance) / energy
    return closed_form_scale(second_D, weight_OD.square().sum(0))


def closed_form_scale(second_D: Tensor, weight_D: Tensor) -> Tensor:
    """Return 1 / c for c = (H_ii / S_ii)^(1/4), both damped, divided by its geometric mean, [D] in float64.

    Args:
        second_D: S_ii.
        weight_D: H_ii.
    """
    damped = [x + DAMPING * x.mean().clamp_min(torch.finfo(torch.float64).tiny) for x in (second_D, weight_D)]
    logarithm_D = (damped[0].log() - damped[1].log()) / 4
    return (logarithm_D - logarithm_D.mean()).exp()
