"""Options of DLLMQuant (arXiv 2508.14090, second-hand): three additions, to AWQ ("+") and to QuaRot ("++")."""

from __future__ import annotations

from typing import ClassVar, Literal

from starquant.config.calibration import TMAS_SHARES, CalibrationSpec, StatesSpec
from starquant.config.fields import Positive, Spec
from starquant.config.methods.awq import AWQOptions
from starquant.config.methods.quarot import QuaRotOptions


class DLLMQuantOptions(Spec):
    """The three additions, switchable one by one.

    Attributes:
        tmas: calibrate on trajectory states, in shares of 0.3, 0.2, 0.2, 0.3 from mask ratios 0 to 1; else on
            `calibration.states` as they are.
        cgq: weight tokens in second moments.
        cgq_unmasked: m of unmasked tokens; that of masked ones is 1.
        ia_aq: static scales for V; without effect where `bits.attention.v` is 16.
    """

    reference: ClassVar[str] = "arXiv 2508.14090"

    tmas: bool = True
    cgq: bool = True
    cgq_unmasked: Positive = 0.7
    ia_aq: bool = True

    @property
    def needs_calibration(self) -> bool:
        """Every addition reads states."""
        return True

    def calibration(self, requested: CalibrationSpec) -> CalibrationSpec:
        """Put TMAS in the place of the requested states."""
        if not self.tmas:
            return requested
        states = StatesSpec(sampler="trajectory", per_segment=requested.states.per_segment, shares=TMAS_SHARES)
        return requested.model_copy(update={"states": states})


class DLLMQuantPlusOptions(DLLMQuantOptions, AWQOptions):
    """AWQ's options and the three additions."""

    algorithm: Literal["dllmquant_plus"] = "dllmquant_plus"  # type: ignore[assignment]


class DLLMQuantPlusPlusOptions(DLLMQuantOptions, QuaRotOptions):
    """QuaRot's options and the three additions."""

    algorithm: Literal["dllmquant_plus_plus"] = "dllmquant_plus_plus"  # type: ignore[assignment]
