"""STaR-Quant's ablations, and what measured best: the same method under other options and a name of its own."""

from __future__ import annotations

from typing import Literal

from starquant.methods.solvers import WeightSolverOptions
from starquant.methods.star_quant.base_transform import TransformOptions
from starquant.methods.star_quant.method import STaRQuant, STaRQuantOptions
from starquant.methods.star_quant.sgat import SGATOptions
from starquant.methods.star_quant.tac import TACOptions


class NoTACOptions(STaRQuantOptions):
    """Without TAC (the paper's ablation)."""

    name: Literal["star_quant_no_tac"]  # type: ignore[assignment]
    tac: TACOptions = TACOptions(enabled=False)


class NoSGATOptions(STaRQuantOptions):
    """Without gates; P is learned all the same, for all tokens alike."""

    name: Literal["star_quant_no_sgat"]  # type: ignore[assignment]
    sgat: SGATOptions = SGATOptions(enabled=False)


class ClosedFormOptions(STaRQuantOptions):
    """With gated directions from second moments instead of a learned P."""

    name: Literal["star_quant_closed_form"]  # type: ignore[assignment]
    transform: TransformOptions = TransformOptions(fit="closed_form")


class PlusOptions(STaRQuantOptions):
    """Our variant, not the paper's: no gates, one TAC map a token state by least squares, GPTQ."""

    name: Literal["star_quant_plus"]  # type: ignore[assignment]
    sgat: SGATOptions = SGATOptions(enabled=False)
    tac: TACOptions = TACOptions(block_size=64, solver="least_squares", condition="state")
    weights: WeightSolverOptions = WeightSolverOptions(name="gptq", mse_clip=True)


class STaRQuantNoTAC(STaRQuant):
    """SGAT alone."""

    Options = NoTACOptions


class STaRQuantNoSGAT(STaRQuant):
    """The learned transform and TAC, without gates."""

    Options = NoSGATOptions


class STaRQuantClosedForm(STaRQuant):
    """Gates from second moments."""

    Options = ClosedFormOptions


class STaRQuantPlus(STaRQuant):
    """What measured best on the embedded models."""

    Options = PlusOptions
