"""Options of QuaRot (arXiv 2404.00456)."""

from __future__ import annotations

from typing import ClassVar, Literal

from starquant.config.bits import BitsSpec
from starquant.config.fields import Seed
from starquant.config.methods.base import BlockwiseOptions, WeightSolverOptions


class QuaRotOptions(BlockwiseOptions):
    """Which rotations, and how weights are rounded.

    Attributes:
        residual_rotation: "hadamard" with random signs, "orthogonal" (Haar, for widths without a Hadamard matrix),
            or "none", which leaves gains unfolded as well.
        rotation_seed: of the random signs or matrix.
        head_hadamard: rotate value heads.
        out_hadamard: rotate across heads online, in front of the output projection; without effect, and noted,
            where no Hadamard matrix has the number of heads.
        down_hadamard: rotate the down projection's input online.
        qk_hadamard: rotate queries and keys online; "auto", as the authors do, where `bits.attention` quantizes one of
            them (a run's record says which it was).
    """

    reference: ClassVar[str] = "arXiv 2404.00456"
    transforms: ClassVar[bool] = True

    algorithm: Literal["quarot"] = "quarot"
    residual_rotation: Literal["hadamard", "orthogonal", "none"] = "hadamard"
    rotation_seed: Seed = 0
    head_hadamard: bool = True
    out_hadamard: bool = True
    down_hadamard: bool = True
    qk_hadamard: bool | Literal["auto"] = "auto"
    weights: WeightSolverOptions = WeightSolverOptions(name="gptq", mse_clip=True)

    @property
    def online(self) -> tuple[str, ...]:
        """Hadamards behind no norm, and of queries and keys."""
        return tuple(name for name in ("out_hadamard", "down_hadamard", "qk_hadamard") if getattr(self, name) is True)

    def at_bits(self, bits: BitsSpec) -> QuaRotOptions:
        """Return the same with what depends on bits decided."""
        if self.qk_hadamard != "auto":
            return self
        return self.model_copy(update={"qk_hadamard": min(bits.attention.q, bits.attention.k) < 16})
