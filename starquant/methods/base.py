"""The contract of a quantization method: `fit` learns and never mutates, `apply` is the only mutation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from starquant.spec import BitsSpec, MethodOptions

if TYPE_CHECKING:
    from torch import Tensor

    from starquant.models.base import MaskedDiffusionModel
    from starquant.records.manifest import ManifestEntry

OptionsT = TypeVar("OptionsT", bound=MethodOptions)


@dataclass(frozen=True)
class Card:
    """What a method declares about itself.

    Attributes:
        reference: the paper it follows.
        needs_calibration: whether `fit` reads activation statistics.
        transforms: whether it changes anything but the rounding, so that 16 bits is a run of its own.
    """

    reference: str
    needs_calibration: bool
    transforms: bool


@dataclass(frozen=True)
class Fitted:
    """What a method learned: named tensors, nothing else, so that safetensors can hold it."""

    tensors: dict[str, Tensor] = field(default_factory=dict)


class Method(ABC, Generic[OptionsT]):
    """A quantization method with its options."""

    card: ClassVar[Card]
    Options: ClassVar[type[MethodOptions]]

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    @abstractmethod
    def fit(self, model: MaskedDiffusionModel, bits: BitsSpec) -> Fitted:
        """Learn what `apply` needs; must not change the model."""

    @abstractmethod
    def apply(
        self, model: MaskedDiffusionModel, fitted: Fitted, bits: BitsSpec, progress: bool = False
    ) -> list[ManifestEntry]:
        """Quantize the model in place and return the manifest: every linear and operand, or why it was left."""
