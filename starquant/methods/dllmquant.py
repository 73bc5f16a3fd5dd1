"""What DLLMQuant (arXiv 2508.14090, second-hand: no official code) adds to AWQ ("+") and to QuaRot ("++").

- TMAS: calibration states are those of real denoising trajectories, stratified over mask ratios.
- CGQ: second moments are those of X * (m + sqrt(conf)): masked and surely predicted tokens count more.
- IA-AQ: V's static scales, one a head and channel, are chosen by the error behind the attention product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from starquant.config.bits import BitsSpec
from starquant.config.calibration import TMAS_SHARES, CalibrationSpec, StatesSpec
from starquant.config.fields import Spec
from starquant.methods.base import Card
from starquant.methods.blockwise import BlockwiseMethod, Tensors
from starquant.methods.fitted import Fitted

if TYPE_CHECKING:
    from starquant.calibration.batches import CalibrationStates
    from starquant.calibration.walk import BlockVisit
    from starquant.models.base import MaskedDiffusionModel
    from starquant.models.roles import BlockSites

V_SCALE = "v.scale"


class DLLMQuantOptions(Spec):
    """The three additions, switchable one by one.

    Attributes:
        tmas: calibrate on trajectory states, in shares of 0.3, 0.2, 0.2, 0.3 from mask ratios 0 to 1; else on
            `calibration.masked_states` as they are.
        cgq: weight tokens in second moments.
        cgq_unmasked: m of unmasked tokens; that of masked ones is 1.
        ia_aq: static scales for V; without effect where `bits.attention.v` is 16.
    """

    tmas: bool = True
    cgq: bool = True
    cgq_unmasked: Annotated[float, Field(gt=0.0)] = 0.7
    ia_aq: bool = True

    @property
    def needs_calibration(self) -> bool:
        """Every addition reads states."""
        return True

    def calibration(self, asked: CalibrationSpec) -> CalibrationSpec:
        """Put TMAS in the place of the states asked for."""
        if not self.tmas:
            return asked
        states = StatesSpec(sampler="trajectory", per_segment=asked.states.per_segment, shares=TMAS_SHARES)
        return asked.model_copy(update={"states": states})


class DLLMQuantAdditions(BlockwiseMethod[Any]):
    """The additions on top of whichever method stands behind in the order of bases."""

    card = Card(reference="arXiv 2508.14090", transforms=True)

    @property
    def weighted(self) -> bool:
        """Whether CGQ is on."""
        return bool(self.options.cgq)

    def observed(self, model: MaskedDiffusionModel, states: CalibrationStates) -> CalibrationStates:
        """Return states with CGQ's token weights, m + sqrt(conf)."""
        from starquant.calibration.masked_states import add_certainty

        if not self.options.cgq:
            return states
        return add_certainty(states, model, masked=1.0, unmasked=self.options.cgq_unmasked)

    def learn(self, visit: BlockVisit, bits: BitsSpec, fitted: Fitted) -> Tensors:
        """Return what the method behind learns, and V's scales."""
        found = super().learn(visit, bits, fitted)
        return found | value_scales(visit, bits, self.options, fitted, found)

    def rewrite(self, sites: BlockSites, tensors: Tensors) -> None:
        """Rewrite as the method behind, and hand V's scales to the attention, where there are some."""
        from starquant.models.roles import Role
        from starquant.quantized import scale_values

        super().rewrite(sites, tensors)
        if V_SCALE in tensors:
            scale_values(sites.attention, tensors[V_SCALE].to(sites.linears[Role.V].weight.device))


def value_scales(
    visit: BlockVisit, bits: BitsSpec, options: DLLMQuantOptions, fitted: Fitted, scales: Tensors
) -> Tensors:
    """Return IA-AQ's scales of V [K, E], in the units V has once the block is rewritten."""
    from starquant.calibration.value_scales import search_value_scales
    from starquant.methods.scaling import scale_names
    from starquant.models.roles import Site
    from starquant.quantized import OPERANDS

    if not options.ia_aq or bits.attention.v == 16:
        if options.ia_aq and visit.index == 0:
            fitted.note("IA-AQ without effect: bits.attention.v = 16", "all blocks")
        return {}
    widths = {operand: getattr(bits.attention, operand) for operand in OPERANDS}
    scale_KE = search_value_scales(visit, widths)
    out_D = scales.get(scale_names(Site.OUT))
    if out_D is not None:  # V will be divided by it
        attention = visit.sites.attention
        heads = out_D.unflatten(0, (attention.n_kv_heads, -1, attention.head_dim))[:, 0]
        scale_KE = scale_KE / heads.to(scale_KE)
    return {V_SCALE: scale_KE}
