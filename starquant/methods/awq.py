"""AWQ (arXiv 2306.00978): scale up the weight channels that meet large activations, then clip and round.

For each site, s = mean|X|^alpha (normalised) with the alpha of a grid that makes the output error of the quantized
weights smallest; then, per output row (or group), the clip ratio that does. Both errors are exact over all calibration
tokens: tr(dW H dW^T) with the second moment H. The query and key projections are not clipped (as published).

AWQ is weight-only. Our definition of "AWQ W4A4": scales and clips are fitted for the weights exactly as published,
then every linear's input is rounded per token at `bits.activations`.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from starquant.calibration.site_statistics import Collect, SiteStatistics
from starquant.calibration.walk import BlockVisit
from starquant.config.bits import BitsSpec
from starquant.config.methods.awq import AWQOptions
from starquant.methods.blockwise import BlockwiseMethod, Tensors
from starquant.methods.fitted import Fitted
from starquant.methods.scaling import apply_scales, group_channels, scale_names
from starquant.models.roles import BlockSites, Role, SiteKey
from starquant.numerics import fake_quantize, output_clip
from starquant.quantized.install import weight_format

AWQT = TypeVar("AWQT", bound=AWQOptions)


class AWQ(BlockwiseMethod[AWQT]):
    """Scale, clip, round."""

    def learn(self, visit: BlockVisit, bits: BitsSpec, fitted: Fitted) -> Tensors:
        """Return a scale [D] for every site and a clip ratio for every row of the clipped linears."""
        if bits.weights.bits == 16:
            return {}
        plan = Collect(second_moment="pooled", weighted=self.weighted)
        statistics = visit.collect(plan)
        tensors: Tensors = {}
        for site in (site for site in visit.sites.inputs if not statistics[site].empty):
            if self.options.scale:
                tensors[scale_names(site)] = self._search_scale(visit, site, statistics[site], bits, fitted)
            if self.options.clip and self.options.weights.name == "rtn":
                tensors |= self._search_clips(visit, site, statistics[site], tensors.get(scale_names(site)), bits)
        return tensors

    def rewrite(self, sites: BlockSites, tensors: Tensors) -> None:
        """Divide the producers, multiply the linears."""
        apply_scales(sites, tensors)

    def _search_scale(
        self, visit: BlockVisit, site: SiteKey, statistics: SiteStatistics, bits: BitsSpec, fitted: Fitted
    ) -> Tensor:
        """Return the best scale of a site; alpha = 0, no scaling, is among the candidates."""
        magnitude_D = statistics.moments().mean_abs
        dead_D = magnitude_D == 0
        if bool(dead_D.any()):
            fitted.note("dead channels left unscaled", f"{visit.name} {site.value}", count=int(dead_D.sum()))
        hessian_DD = statistics.second_moment().mean
        weights = [linear.weight.data for linear in visit.sites.readers(site).values()]
        magnitude_D = torch.where(dead_D, magnitude_D.amax(), magnitude_D)  # no part in the normalisation
        magnitude_D = group_channels(visit.sites, site, magnitude_D.clamp_min(1e-8), "mean")
        best, least = torch.ones_like(magnitude_D), float("inf")
        for step in range(self.options.grid):
            scale_D = magnitude_D ** (step / self.options.grid)
            scale_D = scale_D / (scale_D.amax() * scale_D.amin()).sqrt()
            scale_D = torch.where(dead_D, torch.ones_like(scale_D), scale_D)
            scale_D = group_channels(visit.sites, site, scale_D, "amax")
            error = sum(_output_error(w, scale_D, hessian_DD, bits) for w in weights)
            if error < least:
                best, least = scale_D, error
        return best

    def _search_clips(
        self, visit: BlockVisit, site: SiteKey, statistics: SiteStatistics, scale_D: Tensor | None, bits: BitsSpec
    ) -> Tensors:
        hessian_DD = statistics.second_moment().mean
        tensors: Tensors = {}
        for role, linear in visit.sites.readers(site).items():
            if role.kind in (Role.Q, Role.K):
                continue
            weight = linear.weight.data
            hessian = hessian_DD
            if scale_D is not None:
                weight = (weight.double() * scale_D.to(weight.device)).to(weight)
                hessian = hessian_DD / (scale_D[:, None] * scale_D)
            tensors[f"{role.value}.clip"] = output_clip(weight, hessian, weight_format(bits.weights))
        return tensors


def _output_error(weight_OD: Tensor, scale_D: Tensor, hessian_DD: Tensor, bits: BitsSpec) -> float:
    """Return E||x (Q(W s) / s - W)^T||^2 = tr(dW H dW^T)."""
    scale = scale_D.to(weight_OD.device)
    scaled = (weight_OD.double() * scale).to(weight_OD)
    delta = fake_quantize(scaled, weight_format(bits.weights)).double() / scale - weight_OD.double()
    return float(((delta @ hessian_DD.to(delta)) * delta).sum())
