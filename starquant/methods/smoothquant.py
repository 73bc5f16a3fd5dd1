"""SmoothQuant (arXiv 2211.10438): move outliers from activations into weights, channel by channel.

s = max|X|^alpha / max|W|^(1 - alpha) (eq. 4); the producer of a site gives x / s, its linears hold W diag(s). The
producers are the norm (qkv, gate_up), the value projection (out) and the up projection (down).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from starquant.config.bits import BitsSpec
from starquant.config.fields import Count
from starquant.methods.base import Card
from starquant.methods.blockwise import BlockwiseMethod, BlockwiseOptions, Tensors
from starquant.methods.fitted import Fitted
from starquant.methods.scaling import apply_scales, group_channels, scale_names

if TYPE_CHECKING:
    from torch import Tensor

    from starquant.calibration.walk import BlockVisit
    from starquant.models.roles import BlockSites

SiteName = Literal["qkv_input", "out_input", "gate_up_input", "down_input"]


class SmoothQuantOptions(BlockwiseOptions):
    """Migration strength and where it is applied.

    Attributes:
        alpha: migration strength; 0 makes every channel's largest weight 1, 1 its largest activation.
        search: take, for each site, the alpha of a grid with the smallest quantized output error instead.
        search_rows: rows a token state that the search looks at.
        sites: inputs that are smoothed.
    """

    name: Literal["smoothquant"]
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    search: bool = False
    search_rows: Count = 256
    sites: Annotated[tuple[SiteName, ...], Field(min_length=1)] = ("qkv_input", "gate_up_input")

    @property
    def needs_calibration(self) -> bool:
        """Channel maxima are measured."""
        return True


class SmoothQuant(BlockwiseMethod[SmoothQuantOptions]):
    """Smooth, then round."""

    card = Card(reference="arXiv 2211.10438", transforms=True)
    Options = SmoothQuantOptions
    GRID = tuple(i / 20 for i in range(21))

    def learn(self, visit: BlockVisit, bits: BitsSpec, fitted: Fitted) -> Tensors:
        """Return the scale of every smoothed site, [D]."""
        from starquant.calibration.site_statistics import Collect
        from starquant.models.roles import Site

        wanted = [Site(name) for name in self.options.sites]
        plan = Collect(rows=self.options.search_rows if self.options.search else 0)
        statistics = visit.collect(plan, wanted)
        scales: Tensors = {}
        for site in wanted:
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
    def _scale(visit: BlockVisit, site: object, absmax_D: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
        import torch

        most_D = torch.stack([w.double().abs().amax(0) for w in weights]).amax(0).to(absmax_D.device)
        absmax_D, most_D = (group_channels(visit.sites, site, x, "amax") for x in (absmax_D, most_D))
        scale_D = absmax_D.clamp_min(1e-5) ** alpha / most_D.clamp_min(1e-5) ** (1 - alpha)
        return torch.where(absmax_D > 0, scale_D.clamp_min(1e-5), torch.ones_like(scale_D))

    def _error(
        self,
        visit: BlockVisit,
        site: object,
        absmax_D: Tensor,
        weights: list[Tensor],
        rows_ND: Tensor,
        alpha: float,
        bits: BitsSpec,
    ) -> float:
        """Return the squared output error of a site with quantized weights and activations."""
        from starquant.numerics import fake_quantize
        from starquant.quantized.install import activation_format, weight_format

        rows_ND = rows_ND.float()
        scale_D = self._scale(visit, site, absmax_D, weights, alpha).to(rows_ND)
        x_ND = fake_quantize(rows_ND / scale_D, activation_format(bits.activations))
        error = 0.0
        for w in weights:
            w = w.to(rows_ND)
            quantized = fake_quantize(w * scale_D, weight_format(bits.weights))
            error += float((x_ND @ quantized.T - rows_ND @ w.T).double().square().sum())
        return error
