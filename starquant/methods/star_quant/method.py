"""STaR-Quant (arXiv 2606.04945): SGAT's transformed and gated activations, TAC's corrected attention output.

Every block goes site by site: what the site's linears read is transformed (`base_transform`), gated by token state
(`sgat`), quantized; between attention and output projection stands TAC (`tac`). docs/reproduction.md says what the
paper leaves open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from starquant.config.bits import BitsSpec
from starquant.methods.base import Card
from starquant.methods.blockwise import Tensors
from starquant.methods.fitted import Fitted
from starquant.methods.quarot import QuaRot, QuaRotOptions
from starquant.methods.solvers import WeightSolverOptions
from starquant.methods.star_quant import tac
from starquant.methods.star_quant.base_transform import TransformOptions
from starquant.methods.star_quant.sgat import SGATOptions
from starquant.methods.star_quant.tac import TACOptions
from starquant.session.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import nn

    from starquant.calibration.batches import CalibrationStates
    from starquant.calibration.site_statistics import SiteStatistics
    from starquant.calibration.walk import BlockVisit
    from starquant.models.base import MaskedDiffusionModel
    from starquant.models.roles import BlockSites, Site


class STaRQuantOptions(QuaRotOptions):
    """QuaRot's rotations, from which P starts, and what is put on top of them.

    Attributes:
        transform: how P is found.
        sgat: gates by token state.
        tac: correction of the attention output.
    """

    name: Literal["star_quant"]  # type: ignore[assignment]
    transform: TransformOptions = TransformOptions()
    sgat: SGATOptions = SGATOptions()
    tac: TACOptions = TACOptions()
    weights: WeightSolverOptions = WeightSolverOptions(mse_clip=True)

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is learned from data."""
        learns = self.transform.fit != "fixed" or self.transform.state_clip
        return learns or self.sgat.enabled or self.tac.enabled or super().needs_calibration


class STaRQuant(QuaRot):
    """Transform, gate, correct, round."""

    card = Card(reference="arXiv 2606.04945", transforms=True)
    Options = STaRQuantOptions
    options: Any

    @property
    def drops(self) -> bool:
        """Gates drop directions."""
        return bool(self.options.sgat.enabled)

    @property
    def compares(self) -> bool:
        """TAC needs the exact attention output."""
        return bool(self.options.tac.enabled)

    @property
    def _own(self) -> bool:
        """Whether sites have matrices of their own, in whose place QuaRot's online Hadamards would stand."""
        return self.options.transform.fit != "fixed"

    def check(self, model: MaskedDiffusionModel, bits: BitsSpec) -> None:
        """Judge TAC's blocks, the gates and the structure as well.

        Raises:
            ConfigError: as QuaRot; blocks that do not divide; a closed form asked for as a Kronecker product; a shared
                transform without a rotation to start from.
        """
        from starquant.methods.star_quant.method import site_transforms as star_transforms

        super().check(model, bits)
        star_transforms.check(self.options, model.block_sites(model.trunk().blocks[0]))
        if self.options.tac.enabled:
            tac.check(model, self.options.tac, {name: getattr(bits.attention, name) for name in ("q", "k", "p", "v")})

    def ends(
        self,
        model: MaskedDiffusionModel,
        bits: BitsSpec,
        fitted: Fitted,
        states: CalibrationStates | None = None,
        progress: Progress = SILENT,
    ) -> Tensors:
        """Return the residual rotation, learned where it is shared by all sites."""
        from starquant.methods.star_quant.shared_transform import fit_shared

        ends = super().ends(model, bits, fitted, states, progress)
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
        from starquant.methods.solvers import solve_sites
        from starquant.methods.star_quant.method import site_transforms as star_transforms
        from starquant.models.roles import Site
        from starquant.quantized.rewriting import rounded_once

        tensors: Tensors = {}
        solves = self.options.weights.name == "gptq" and bits.weights.bits < 16
        sequential = visit.feeds_quantized and solves  # sites are quantized as the loop goes on
        statistics = {} if sequential else self._collect(visit, tuple(Site))
        for site in Site:
            if site is Site.OUT and self.options.tac.enabled and not bits.full_precision:
                tensors |= tac.fit(visit, self._quantized_attention(visit, tensors, bits), self.options.tac)
                if sequential:  # the output projection will read corrected outputs
                    self.compensate(visit.sites, tensors, bits)
            seen = self._collect(visit, (site,)) if sequential else statistics
            found = star_transforms.fit_site(visit, site, seen.get(site), bits, self.options, fitted)
            with rounded_once(visit.block):
                self.rewrite(visit.sites, found)
            tensors |= found
            if solves:  # weights are solved on gated inputs
                self.compensate(visit.sites, tensors if sequential else found, bits)
                tensors |= solve_sites(visit, (site,), fed, self.options.weights, fitted, self.weighted)
                if not sequential:
                    star_transforms.keep_exact_part(visit.sites, site)
        return tensors

    def _collect(self, visit: BlockVisit, sites: Sequence[Site]) -> dict[Site, SiteStatistics]:
        from starquant.calibration.site_statistics import Collect

        options = self.options.transform
        closed = options.fit == "closed_form"
        if options.fit == "fixed" and not options.state_clip and self.options.sgat.keep == "always":
            visit.observe()
            return {}
        plan = Collect(moments=False, rows=2 * options.rows, second_moment="state" if closed else None)
        return visit.collect(plan, sites)

    def _quantized_attention(self, visit: BlockVisit, tensors: Tensors, bits: BitsSpec) -> nn.Module:
        """Return a copy of the block whose attention is quantized: inputs, weights and operands."""
        import copy

        from starquant.methods.solvers import solver_of
        from starquant.models.roles import Site
        from starquant.quantized import FakeQuantLinear
        from starquant.quantized.install import quantize_attention, quantize_linear

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
        """Fold each site's matrix into the linears that read it, and put it there."""
        from starquant.methods.star_quant.method import site_transforms as star_transforms

        star_transforms.rewrite(sites, tensors)

    def compensate(self, sites: BlockSites, tensors: Tensors, bits: BitsSpec) -> None:
        """Put gates, clip ratios and TAC in place."""
        from starquant.methods.star_quant.method import site_transforms as star_transforms

        star_transforms.compensate(sites, tensors, bits, self.options.tac)
