"""STaR-Quant (arXiv 2606.04945): SGAT's transformed and gated activations, TAC's corrected attention output.

Every block goes site by site: what the site's linears read is transformed (`base_transform`), gated by token state
(`sgat`), quantized; between attention and output projection stands TAC (`tac`). docs/reproduction.md says what the
paper leaves open.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from starquant.calibration.batches import CalibrationStates
from starquant.calibration.site_statistics import Collect, SiteStatistics
from starquant.calibration.walk import BlockVisit
from starquant.config.bits import BitsSpec
from starquant.config.methods.star_quant import STaRQuantOptions
from starquant.methods.blockwise import Tensors
from starquant.methods.fitted import Fitted
from starquant.methods.quarot import QuaRot
from starquant.methods.scaling import apply_scales
from starquant.methods.solvers import solve_sites, solver_of
from starquant.methods.star_quant.channel_scales import fit_channel_scales
from starquant.methods.star_quant.fisher import fisher_part, fit_fisher, output_weights, weigh_visit
from starquant.methods.star_quant.shared_transform import fit_shared
from starquant.methods.star_quant.site_transforms import (
    compensate_sites,
    fit_site,
    keep_exact_part,
    rewrite_sites,
)
from starquant.methods.star_quant.tac import fit_tac, validate_tac
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import BlockSites, Site, SiteKey
from starquant.quantized import FakeQuantLinear
from starquant.quantized.install import quantize_attention, quantize_linear
from starquant.session.progress import SILENT, Progress


class STaRQuant(QuaRot[STaRQuantOptions]):
    """Transform, gate, correct, round."""

    @property
    def drops(self) -> bool:
        """Gates drop directions."""
        return self.options.sgat.enabled

    @property
    def weighted(self) -> bool:
        """GPTQ's Hessian is Fisher-weighted."""
        return self.options.fisher.hessian

    @property
    def compares(self) -> bool:
        """TAC needs the exact attention output."""
        return self.options.tac.enabled

    @property
    def _own(self) -> bool:
        """Whether sites have matrices of their own, in whose place QuaRot's online Hadamards would stand."""
        return self.options.transform.fit != "fixed"

    def validate(self, model: MaskedDiffusionModel, bits: BitsSpec) -> None:
        """Judge TAC's blocks as well.

        Raises:
            ConfigError: as QuaRot; blocks that do not divide.
        """
        super().validate(model, bits)
        if self.options.tac.enabled:
            validate_tac(model, self.options.tac, bits.attention)

    def ends(
        self,
        model: MaskedDiffusionModel,
        bits: BitsSpec,
        fitted: Fitted,
        states: CalibrationStates | None = None,
        progress: Progress = SILENT,
    ) -> Tensors:
        """Return the residual rotation, learned where it is shared by all sites."""
        ends = super().ends(model, bits, fitted, states, progress)
        if self.options.fisher.weighs:
            assert states is not None
            fit_fisher(model, states, fitted, progress)
        if self.options.transform.structure == "shared" and self._own:
            assert states is not None
            return fit_shared(self, model, bits, states, ends, fitted, progress)
        return ends

    def place(self, sites: BlockSites) -> None:
        """Leave the sites behind no norm to their own matrices, which start from these Hadamards."""
        if not self._own:
            super().place(sites)

    def _fit_block(self, visit: BlockVisit, bits: BitsSpec, fed: BitsSpec, fitted: Fitted) -> Tensors:
        """Fit site after site, each seeing what the sites before it have become."""
        tensors: Tensors = {}
        fisher = fitted.get(fisher_part(visit.index)) if self.options.fisher.weighs else {}
        weigh_visit(visit, fisher)
        if self.options.transform.channel_scales:
            tensors |= fit_channel_scales(visit)
            self.rewrite_visit(visit, tensors)
        outputs = output_weights(visit.sites, fisher, tensors, self.options) if self.options.fisher.outputs else {}
        sequential = visit.feeds_quantized and self.solves(bits)  # sites are quantized as the loop goes on
        statistics = {} if sequential else self._collect(visit, tuple(visit.sites.inputs))
        for site in tuple(visit.sites.inputs):
            if site is Site.OUT and self.options.tac.enabled and not bits.full_precision:
                tensors |= fit_tac(visit, self._quantized_attention(visit, tensors, bits), self.options.tac)
                if sequential:  # the output projection will read corrected outputs
                    self.compensate(visit.sites, tensors, bits)
            seen = self._collect(visit, (site,)) if sequential else statistics
            of_site = fit_site(visit, site, seen.get(site), bits, self.options, fitted, outputs)
            self.rewrite_visit(visit, of_site)
            tensors |= of_site
            if self.solves(bits):  # weights are solved on gated inputs
                self.compensate(visit.sites, tensors if sequential else of_site, bits)
                tensors |= solve_sites(visit, (site,), fed, self.options.weights, fitted, self.weighted)
                if not sequential:
                    keep_exact_part(visit.sites, site)
        return tensors

    def _collect(self, visit: BlockVisit, sites: Sequence[SiteKey]) -> dict[SiteKey, SiteStatistics]:
        options = self.options.transform
        if options.fit == "fixed" and not options.state_clip and self.options.sgat.keep == "always":
            visit.observe()
            return {}
        reads_moments = any(options.reads_moments(visit.sites.width(site)) for site in sites)
        second_moment, weighted = "state" if reads_moments else None, self.options.fisher.rows
        plan = Collect(moments=False, rows=2 * options.rows, second_moment=second_moment, weighted_rows=weighted)
        return visit.collect(plan, sites)

    def _quantized_attention(self, visit: BlockVisit, tensors: Tensors, bits: BitsSpec) -> nn.Module:
        """Return a copy of the block whose attention is quantized: inputs, weights and operands."""
        twin = copy.deepcopy(visit.block)
        self.compensate(visit.model.block_sites(twin), tensors, bits)
        for info in visit.model.block_linears(twin, visit.index).values():
            if info.role.site is Site.QKV:
                solved = isinstance(info.module, FakeQuantLinear)  # then only its input is left to quantize
                solve = None if solved else solver_of(tensors, bits, self.options.weights)
                quantize_linear(visit.model, twin, info, bits, solve)
        quantize_attention(visit.model, twin, visit.index, bits.attention)
        return twin

    def rewrite(self, sites: BlockSites, tensors: Tensors) -> None:
        """Fold each site's scales, and its matrix into the linears that read it, and put that there."""
        apply_scales(sites, tensors)
        rewrite_sites(sites, tensors, self.options.transform.balance)

    def compensate(self, sites: BlockSites, tensors: Tensors, bits: BitsSpec) -> None:
        """Put gates, clip ratios and TAC in place."""
        compensate_sites(sites, tensors, bits, self.options.tac)
