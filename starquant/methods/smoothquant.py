"""SmoothQuant (arXiv 2211.10438): move outliers from activations into weights, channel by channel.

s = max|X|^alpha / max|W|^(1 - alpha) (eq. 4); the producer of a site gives x / s, its linears hold W diag(s). The
producers are the norm (qkv, gate_up), the value projection (out) and the up projection (down).
"""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.calibration.site_statistics import Collect
from starquant.calibration.walk import BlockVisit
from starquant.config.bits import BitsSpec
from starquant.config.methods.smoothquant import SmoothQuantOptions
from starquant.methods.blockwise import BlockwiseMethod, Tensors
from starquant.methods.fitted import Fitted
from starquant.methods.scaling import apply_scales, group_channels, scale_names
from starquant.models.roles import BlockSites, SiteKey
from starquant.numerics import fake_quantize
from starquant.quantized.install import activation_format, weight_format


class SmoothQuant(BlockwiseMethod[SmoothQuantOptions]):
    """Smooth, then round."""

    GRID = tuple(i / 20 for i in range(21))

    def learn(self, visit: BlockVisit, bits: BitsSpec, fitted: Fitted) -> Tensors:
        """Return the scale of every smoothed site, [D]."""
        wanted = [site for site in visit.sites.inputs if site.kind.value in self.options.sites]
        plan = Collect(rows=self.options.search_rows if self.options.search else 0)
        statistics = visit.collect(plan, wanted)
        scales: Tensors = {}
        for site in (site for site in wanted if not statistics[site].empty):
            absmax_D = statistics[site].moments().absmax
            dead = int((absmax_D == 0).sum())
            if dead:
                fitted.note("dead channels left unscaled", f"{visit.name} {site.value}", count=dead)
            weights = [linear.weight.data for linear in visit.sites.readers(site).values()]
            alpha = self.options.alpha
            if self.options.search:
                rows_ND = statistics[site].rows()
                alpha = min(self.GRID, key=lambda a, s=site: self._error(visit, s, absmax_D, weights, rows_ND, a, bits))
                fitted.note("alpha found", f"{visit.name} {site.value}", alpha=alpha)
            scales[scale_names(site)] = self._scale(visit, site, absmax_D, weights, alpha)
        return scales

    def rewrite(self, sites: BlockSites, tensors: Tensors) -> None:
        """Divide the producers, multiply the linears."""
        apply_scales(sites, tensors)

    @staticmethod
    def _scale(visit: BlockVisit, site: SiteKey, absmax_D: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
        most_D = torch.stack([w.double().abs().amax(0) for w in weights]).amax(0).to(absmax_D.device)
        absmax_D, most_D = (group_channels(visit.sites, site, x, "amax") for x in (absmax_D, most_D))
        scale_D = absmax_D.clamp_min(1e-5) ** alpha / most_D.clamp_min(1e-5) ** (1 - alpha)
        return torch.where(absmax_D > 0, scale_D.clamp_min(1e-5), torch.ones_like(scale_D))

    def _error(
        self,
        visit: BlockVisit,
        site: SiteKey,
        absmax_D: Tensor,
        weights: list[Tensor],
        rows_ND: Tensor,
        alpha: float,
        bits: BitsSpec,
    ) -> float:
        """Return the squared output error of a site with quantized weights and activations."""
        rows_ND = rows_ND.float()
        scale_D = self._scale(visit, site, absmax_D, weights, alpha).to(rows_ND)
        x_ND = fake_quantize(rows_ND / scale_D, activation_format(bits.activations))
        error = 0.0
        for w in weights:
            w = w.to(rows_ND)
            quantized = fake_quantize(w * scale_D, weight_format(bits.weights))
            error += float((x_ND @ quantized.T - rows_ND @ w.T).double().square().sum())
        return error
