"""What every method can be asked: a name, the algorithm behind it, how weights are put on their grid."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from starquant.config.bits import AuthorsGrid, BitsSpec
from starquant.config.calibration import CalibrationSpec
from starquant.config.fields import INERT, LONGEST_NAME, Count, Positive, Share, Spec

LearningRate = Annotated[float, Field(gt=0.0, le=10.0)]
#: How float32 matrices are multiplied while a method learns; "auto" is bfloat16 where something is rounded to at most 4
#: bits, whose steps are far coarser.
Products = Literal["auto", "float32", "bfloat16"]


def _validate_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]+", name) or len(name) > LONGEST_NAME:
        raise ValueError(f"got {name[:80]!r}, allowed: up to {LONGEST_NAME} lower-case letters, digits and _")
    return name


class MethodOptions(Spec):
    """Base of a method's options.

    Attributes:
        name: what records, tables and files call it; a variant has a name of its own.
        algorithm: the registered method that it is; each class allows its own.
        authors: the grid that its authors round to, for `bits.grid=authors`; None for the common one. Inert: the bits
            of a run's canonical form hold what it comes to.
        reference: the paper that the algorithm follows.
        transforms: whether it changes anything but the rounding, so that 16 bits is a run of its own.
    """

    reference: ClassVar[str]
    transforms: ClassVar[bool]

    name: Annotated[str, AfterValidator(_validate_name)]
    algorithm: str
    authors: AuthorsGrid | None = Field(default=None, json_schema_extra=INERT)

    @property
    def needs_calibration(self) -> bool:
        """Whether `fit` reads calibration states under these options."""
        return False

    def at_bits(self, bits: BitsSpec) -> MethodOptions:
        """Return the same with what depends on bits decided."""
        return self

    @property
    def online(self) -> tuple[str, ...]:
        """Options, without "method." in front, that leave something to compute between the linears."""
        return ()

    @property
    def propagates(self) -> bool:
        """Whether weights make up for roundings in front of them, which calibration must then see."""
        return False

    def calibration(self, requested: CalibrationSpec) -> CalibrationSpec:
        """Return what the method calibrates on; a method that prescribes its states says so here."""
        return requested


class WeightSolverOptions(Spec):
    """How the (transformed) weights are put on their grid.

    Attributes:
        name: "rtn" rounds to nearest, "gptq" compensates each rounding in the columns that follow.
        mse_clip: shrink each row's (group's) range to where its squared error is smallest.
        percdamp: GPTQ's damping, as a share of the Hessian's mean diagonal.
        act_order: GPTQ visits inputs by decreasing Hessian diagonal.
        block_size: GPTQ's columns a lazy update; changes the speed only.
        propagation: share of what earlier roundings, and that of its own input, have done to a linear's input that its
            weight is asked to make up for before GPTQ rounds it (QEP, arXiv 2504.09629); of no expert's own input.
    """

    name: Literal["rtn", "gptq"] = "rtn"
    mse_clip: bool = False
    percdamp: Positive = 0.01
    act_order: bool = False
    block_size: Count = Field(default=128, json_schema_extra=INERT)
    propagation: Share = 0.0

    @field_validator("propagation")
    @classmethod
    def _validate_propagation(cls, propagation: float, info: ValidationInfo) -> float:
        if propagation and info.data.get("name") == "rtn":
            raise ValueError(f"got {propagation:g} for name=rtn, allowed: 0, or method.weights.name=gptq")
        return propagation


class BlockwiseOptions(MethodOptions):
    """Options that every method has which quantizes block by block.

    Attributes:
        weights: how weights are put on their grid.
        solver: the one solver that the method is, None where `weights` chooses.
    """

    solver: ClassVar[str | None] = None

    weights: WeightSolverOptions = WeightSolverOptions()

    @property
    def needs_calibration(self) -> bool:
        """GPTQ reads second moments."""
        return self.weights.name == "gptq"

    @property
    def propagates(self) -> bool:
        """QEP's share is above 0."""
        return self.weights.propagation > 0.0

    @field_validator("weights")
    @classmethod
    def _validate_solver(cls, weights: WeightSolverOptions) -> WeightSolverOptions:
        if cls.solver not in (None, weights.name):
            raise ValueError(f"name: got '{weights.name}', allowed: {cls.solver} (method={weights.name} is the other)")
        return weights
