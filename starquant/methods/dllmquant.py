"""What DLLMQuant (arXiv 2508.14090, second-hand: no official code) adds to AWQ ("+") and to QuaRot ("++").

- TMAS: calibration states are those of real denoising trajectories, stratified over mask ratios.
- CGQ: second moments are those of X * (m + sqrt(conf)): masked and surely predicted tokens count more.
- IA-AQ: V's static scales, one a head and channel, are chosen by the error behind the attention product.
"""

from __future__ import annotations

from typing import Any

from starquant.calibration.batches import CalibrationStates
from starquant.calibration.masked_states import add_certainty
from starquant.calibration.value_scales import search_value_scales
from starquant.calibration.walk import BlockVisit
from starquant.config.bits import BitsSpec
from starquant.config.methods.dllmquant import DLLMQuantOptions, DLLMQuantPlusOptions, DLLMQuantPlusPlusOptions
from starquant.errors import ConfigError
from starquant.methods.awq import AWQ
from starquant.methods.blockwise import BlockwiseMethod, Tensors
from starquant.methods.fitted import Fitted
from starquant.methods.quarot import QuaRot
from starquant.methods.scaling import of_producer, scale_names
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import BlockSites, Role, Site
from starquant.quantized import OPERANDS, set_static_value_scales
from starquant.quantized.attention import KeyValueGrid

V_SCALE = "v.scale"


class DLLMQuantAdditions(BlockwiseMethod[Any]):
    """The additions on top of whichever method stands behind in the order of bases."""

    @property
    def weighted(self) -> bool:
        """Whether CGQ is on."""
        return bool(self.options.cgq)

    def observed(self, model: MaskedDiffusionModel, states: CalibrationStates) -> CalibrationStates:
        """Return states with CGQ's token weights, m + sqrt(conf)."""
        if not self.options.cgq:
            return states
        return add_certainty(states, model, masked=1.0, unmasked=self.options.cgq_unmasked)

    def validate(self, model: MaskedDiffusionModel, bits: BitsSpec) -> None:
        """Judge V's grid as well.

        Raises:
            ConfigError: as the method behind; an asymmetric V, which has no static scales.
        """
        super().validate(model, bits)
        if self.options.ia_aq and bits.attention.v < 16 and not bits.attention.kv_symmetric:
            raise ConfigError(
                "bits.attention.kv_symmetric: got false, but the static scales of V (method.ia_aq=true) are symmetric; "
                "allowed: true, or method.ia_aq=false"
            )

    def learn(self, visit: BlockVisit, bits: BitsSpec, fitted: Fitted) -> Tensors:
        """Return what the method behind learns, and V's scales."""
        tensors = super().learn(visit, bits, fitted)
        return tensors | value_scales(visit, bits, self.options, fitted, tensors)

    def rewrite(self, sites: BlockSites, tensors: Tensors) -> None:
        """Rewrite as the method behind, and hand V's scales to the attention, where there are some."""
        super().rewrite(sites, tensors)
        if V_SCALE in tensors:
            set_static_value_scales(sites.attention, tensors[V_SCALE].to(sites.linears[Role.V].weight.device))


def value_scales(
    visit: BlockVisit, bits: BitsSpec, options: DLLMQuantOptions, fitted: Fitted, scales: Tensors
) -> Tensors:
    """Return IA-AQ's scales of V [K, E], in the units V has once the block is rewritten."""
    if not options.ia_aq or bits.attention.v == 16:
        if options.ia_aq and visit.index == 0:
            fitted.note("IA-AQ without effect: bits.attention.v = 16", "all blocks")
        return {}
    widths = {operand: getattr(bits.attention, operand) for operand in OPERANDS}
    scale_KE = search_value_scales(visit, widths, KeyValueGrid.of(bits.attention))
    out_D = scales.get(scale_names(Site.OUT))
    if out_D is not None:  # V will be divided by it
        scale_KE = scale_KE / of_producer(visit.sites, Site.OUT, out_D).view_as(scale_KE).to(scale_KE)
    return {V_SCALE: scale_KE}


class DLLMQuantPlus(DLLMQuantAdditions, AWQ[DLLMQuantPlusOptions]):
    """DLLMQuant+: AWQ on weighted trajectory states, with static value scales.

    How CGQ's Hessian enters AWQ is open; ours is the one that AWQ's output error is measured with.
    """


class DLLMQuantPlusPlus(DLLMQuantAdditions, QuaRot[DLLMQuantPlusPlusOptions]):
    """DLLMQuant++: QuaRot and GPTQ on weighted trajectory states, with static value scales."""
