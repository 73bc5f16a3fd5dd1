"""DLLMQuant++ (arXiv 2508.14090, second-hand): QuaRot and GPTQ with TMAS, CGQ and IA-AQ (see `dllmquant_plus`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from starquant.bits import BitsSpec
from starquant.methods.base import Card
from starquant.methods.blockwise import Tensors
from starquant.methods.dllmquant_plus import DLLMQuantOptions, install_value_scales, value_scales, weigh
from starquant.methods.fitted import Fitted
from starquant.methods.quarot import QuaRot, QuaRotOptions

if TYPE_CHECKING:
    from starquant.calibration.batches import CalibrationStates
    from starquant.calibration.engine import BlockVisit
    from starquant.models.base import MaskedDiffusionModel
    from starquant.models.roles import BlockSites


class DLLMQuantPlusPlusOptions(DLLMQuantOptions, QuaRotOptions):
    """QuaRot's options and the three additions."""

    name: Literal["dllmquant_plus_plus"]  # type: ignore[assignment]


class DLLMQuantPlusPlus(QuaRot):
    """QuaRot on weighted trajectory states, with static value scales."""

    card = Card(reference="arXiv 2508.14090", transforms=True)
    Options = DLLMQuantPlusPlusOptions
    options: DLLMQuantPlusPlusOptions

    @property
    def weighted(self) -> bool:
        """Whether CGQ is on."""
        return self.options.cgq

    def observed(self, model: MaskedDiffusionModel, states: CalibrationStates) -> CalibrationStates:
        """Weight the states' tokens by certainty."""
        return weigh(model, states, self.options)

    def learn(self, visit: BlockVisit, bits: BitsSpec, fitted: Fitted) -> Tensors:
        """Return V's scales, in the rotated heads."""
        return value_scales(visit, bits, self.options, fitted, {})

    def rewrite(self, sites: BlockSites, tensors: Tensors) -> None:
        """Hand V's scales to the attention."""
        install_value_scales(sites, tensors)
