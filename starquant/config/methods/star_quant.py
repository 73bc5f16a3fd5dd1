"""Options of STaR-Quant (arXiv 2606.04945): the transform P, SGAT's gates, TAC; QuaRot's rotations below them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from starquant.config.fields import Count, Positive, Rows, Share, Spec, Steps, Whole
from starquant.config.methods.base import LearningRate, Products, WeightSolverOptions
from starquant.config.methods.quarot import QuaRotOptions

GateShare = Annotated[float, Field(ge=0.0, le=0.45)]
FREEACT = 1 / 32


class TransformOptions(Spec):
    """How P is made.

    Attributes:
        fit: "fixed" keeps QuaRot's rotation; "closed_form" takes the gated directions from the second moments of
            masked and unmasked tokens, of a Kronecker product those of the first factor; "learned" minimises the error
            of the group's output.
        start: of what is learned: "rotation" (QuaRot's), or "closed_form", which turns the directions that a state is
            gated off to where it has no energy; sites whose matrix is not dense start from the rotation.
        structure: of P, unless it is fixed; "auto" is dense up to `dense_width` channels and Kronecker beyond.
        dense_width: of "auto".
        sites: "all", or "residual" of structure "shared": what folds into the weights, and no matrix behind no norm.
        channel_scales: scale the native channels in front of P, in closed form, at the sites behind a norm and an up
            projection, which take the scales; only without a residual rotation, and with a matrix at every site.
        balance: put an invertible map in closed form in front of what is learned, part of P: what it takes from the
            rounding of one side of the product it does not add to the other.
        rows: tokens of each state that it is learned on, and as many it is judged on.
        batch: of these tokens of each state, how many a step sees.
        steps: of Adam.
        products: of float32 matrices while it is learned: "float32", or "bfloat16" where the machine multiplies these
            faster; "auto" is bfloat16 where something is rounded to at most 4 bits.
        learning_rate: at the start; a cosine brings it to zero.
        clip_learning_rate: of the logits of the clip ratios, in the same way.
        state_clip: learn how much of each token's range the grid covers, one ratio a token state.
        clip_every: steps between two searches of the weights' clip ratios, where weights are clipped.
    """

    fit: Literal["fixed", "closed_form", "learned"] = "learned"
    start: Literal["rotation", "closed_form"] = "rotation"
    structure: Literal["auto", "dense", "kronecker", "shared"] = "auto"
    dense_width: Count = 1024
    sites: Literal["all", "residual"] = "all"
    channel_scales: bool = False
    balance: bool = False
    rows: Rows = 1024
    batch: Rows = 128
    steps: Steps = 160
    products: Products = "auto"
    learning_rate: LearningRate = 0.02
    clip_learning_rate: LearningRate = 0.2
    state_clip: bool = True
    clip_every: Count = 20

    def reads_moments(self, width: int) -> bool:
        """Return whether the second moments [width, width] of both token states are needed."""
        closed = self.fit == "closed_form" or (self.fit == "learned" and self.start == "closed_form")
        return (closed or self.balance) and self.structure_of(width) == "dense"

    def structure_of(self, width: int) -> str:
        """Return "dense" or "kronecker" for a site with a matrix of its own."""
        if self.structure in ("dense", "kronecker"):
            return self.structure
        return "dense" if width <= self.dense_width else "kronecker"


class SiteShares(Spec):
    """A share of the channels of each site."""

    qkv_input: GateShare = FREEACT
    out_input: GateShare = FREEACT
    gate_up_input: GateShare = FREEACT
    down_input: GateShare = FREEACT


class SGATOptions(Spec):
    """Which channels belong to one token state only.

    Attributes:
        enabled: off gates nothing.
        masked: d_m as a share of each site's width, rounded to whole channels.
        unmasked: d_u likewise.
        first_attention: gate the first block's attention input too, where all masked tokens share one vector.
        keep: "always", or "if_better": a site keeps its gate only if the error of the group's output is smaller with
            it than with the same P ungated, on rows that P was not learned on.
    """

    enabled: bool = True
    masked: SiteShares = SiteShares()
    unmasked: SiteShares = SiteShares()
    first_attention: bool = False
    keep: Literal["always", "if_better"] = "always"


class TACOptions(Spec):
    """Whether and how the attention output is corrected.

    Attributes:
        enabled: off leaves it alone.
        block_size: g, channels of a block.
        solver: "moment_matching" brings mean and covariance to the exact ones (paper); "least_squares" minimises
            the squared error, damped towards the identity.
        damping: of the covariance, as a share of its mean variance.
        smoothing: how far singular values of M move to 1; of "moment_matching".
        shrinkage: how far M moves to the identity.
        condition: one map for "all" tokens (paper), one a token "state", or one a state and mask-ratio "bin".
        placement: on the attention "output" (paper), or on the "value"s, where it is the same at no cost: one map for
            all tokens, V and the probabilities at 16 bits, g dividing the head width; heads that share values share
            maps.
    """

    enabled: bool = True
    block_size: Annotated[Literal[4, 8, 16, 32, 64], Whole] = 16
    solver: Literal["moment_matching", "least_squares"] = "moment_matching"
    damping: Positive = 0.01
    smoothing: Share = 0.0
    shrinkage: Share = 0.0
    condition: Literal["all", "state", "bin"] = "all"
    placement: Literal["output", "value"] = "output"


class FisherOptions(Spec):
    """What is weighed by how much the likelihood of labels drawn from the model depends on it (empirical Fisher).

    Attributes:
        outputs: of linears, in the error that P is learned on.
        rows: tokens, in the same error.
        hessian: tokens, in the second moments that GPTQ solves with.
    """

    outputs: bool = False
    rows: bool = False
    hessian: bool = False

    @property
    def weighs(self) -> bool:
        """Whether anything is weighed."""
        return self.outputs or self.rows or self.hessian


class STaRQuantOptions(QuaRotOptions):
    """QuaRot's rotations, from which P starts, and what is put on top of them.

    Attributes:
        fisher: what the error counts for.
        transform: how P is made.
        sgat: gates by token state.
        tac: correction of the attention output.
    """

    reference: ClassVar[str] = "arXiv 2606.04945"

    algorithm: Literal["star_quant"] = "star_quant"  # type: ignore[assignment]
    transform: TransformOptions = TransformOptions()
    sgat: SGATOptions = SGATOptions()
    tac: TACOptions = TACOptions()
    fisher: FisherOptions = FisherOptions()
    weights: WeightSolverOptions = WeightSolverOptions(mse_clip=True)

    @property
    def _learns(self) -> bool:
        """Whether sites learn a transform of their own."""
        return self.transform.fit == "learned" and self.transform.structure != "shared"

    @model_validator(mode="after")
    def _validate_gates(self) -> STaRQuantOptions:
        for name, shares in (("masked", self.sgat.masked), ("unmasked", self.sgat.unmasked)):
            behind_norms = [shares.qkv_input, shares.gate_up_input]
            if self.transform.structure == "shared" and self.sgat.enabled and behind_norms[0] != behind_norms[1]:
                raise ValueError(
                    f"method.sgat.{name}: got {behind_norms[0]} at qkv_input and {behind_norms[1]} at gate_up_input, "
                    "which share a transform (method.transform.structure=shared); allowed: one share for both"
                )
        return self

    @model_validator(mode="after")
    def _validate_transform(self) -> STaRQuantOptions:
        transform = self.transform
        if transform.balance and not (self._learns and transform.start == "rotation"):
            raise ValueError(
                f"method.transform.balance: got true, but method.transform.fit is '{transform.fit}', start "
                f"'{transform.start}', structure '{transform.structure}'; allowed: true with learned, rotation and "
                "another structure than shared"
            )
        if transform.channel_scales and (self.residual_rotation != "none" or transform.fit == "fixed"):
            raise ValueError(
                f"method.transform.channel_scales: got true, but method.residual_rotation is "
                f"'{self.residual_rotation}' and method.transform.fit '{transform.fit}'; allowed: true with none and "
                "learned or closed_form"
            )
        if transform.sites == "residual" and transform.fit != "fixed" and transform.structure != "shared":
            raise ValueError(
                f"method.transform.sites: got residual, but structure is '{transform.structure}'; allowed: shared"
            )
        return self

    @model_validator(mode="after")
    def _validate_fisher(self) -> STaRQuantOptions:
        fisher, transform = self.fisher, self.transform
        if (fisher.outputs or fisher.rows) and not self._learns:
            name = "outputs" if fisher.outputs else "rows"
            raise ValueError(
                f"method.fisher.{name}: got true, but no site learns a transform of its own (method.transform.fit="
                f"{transform.fit}, structure={transform.structure}); allowed: false"
            )
        if fisher.hessian and self.weights.name != "gptq":
            raise ValueError(
                f"method.fisher.hessian: got true, but method.weights.name={self.weights.name} reads no second "
                "moments; allowed: false"
            )
        return self

    @model_validator(mode="after")
    def _validate_rotation(self) -> STaRQuantOptions:
        shared = self.transform.structure == "shared" and self.transform.fit != "fixed"
        if shared and self.residual_rotation == "none":
            raise ValueError(
                "method.residual_rotation: got 'none', but method.transform.structure=shared learns the residual "
                "rotation; allowed: hadamard, orthogonal"
            )
        return self

    @property
    def online(self) -> tuple[str, ...]:
        """Matrices at the sites, gates, clip ratios of token states, a corrected attention output."""
        transform = self.transform
        own = transform.fit != "fixed" and transform.sites == "all"
        left = {
            "transform.fit": own,
            "transform.state_clip": transform.state_clip,
            "sgat.enabled": self.sgat.enabled,
            "tac.enabled": self.tac.enabled,
        }
        return (*(super().online if not own else ()), *(name for name, stays in left.items() if stays))

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is learned from data."""
        learns = self.transform.fit != "fixed" or self.transform.state_clip
        return learns or self.sgat.enabled or self.tac.enabled or self.fisher.weighs or super().needs_calibration
