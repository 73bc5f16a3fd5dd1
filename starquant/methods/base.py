"""The contract of a quantization method: `fit` learns and never mutates, `apply` is the only mutation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from starquant.calibration.batches import CalibrationStates
from starquant.config.bits import BitsSpec
from starquant.config.methods.base import MethodOptions
from starquant.methods.fitted import Fitted
from starquant.models.base import MaskedDiffusionModel
from starquant.session.progress import SILENT, Progress
from starquant.store.manifest import ManifestEntry

OptionsT = TypeVar("OptionsT", bound=MethodOptions)


class Method(ABC, Generic[OptionsT]):
    """A quantization method with its options.

    Whether it needs calibration states depends on the options: `MethodOptions.needs_calibration`.
    """

    @property
    def drops(self) -> bool:
        """Whether some directions of activations are dropped on purpose, whatever the bits (SGAT's gates)."""
        return False

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def validate(self, model: MaskedDiffusionModel, bits: BitsSpec) -> None:
        """Judge what the shapes alone tell, before anything is computed.

        Args:
            model: may be on the meta device.
            bits: what it will be quantized to.

        Raises:
            ConfigError: options or bits that do not fit the model.
        """

    def fit(
        self,
        model: MaskedDiffusionModel,
        bits: BitsSpec,
        states: CalibrationStates | None = None,
        into: Fitted | None = None,
        progress: Progress = SILENT,
    ) -> Fitted:
        """Learn what `apply` needs, by default nothing; must not change the model.

        Args:
            model: at full precision; its blocks may be on disk.
            bits: what it will be quantized to.
            states: what to calibrate on; None for methods that need none.
            into: where to keep what is learned, by default in memory.
            progress: draws bars.

        Raises:
            DataError: states that cannot be used (none at all, values that are not finite, a missing token state).
        """
        return into if into is not None else Fitted()

    @abstractmethod
    def apply(
        self,
        model: MaskedDiffusionModel,
        fitted: Fitted,
        bits: BitsSpec,
        progress: Progress = SILENT,
        packed: bool = False,
    ) -> list[ManifestEntry]:
        """Quantize the model in place and return the manifest: every linear and operand, or why it was left.

        Args:
            model: at full precision.
            fitted: by `fit`.
            bits: as in `fit`.
            progress: draws a bar.
            packed: keep weights as codes (`quantized.packed_linear`) instead of the values they stand for.
        """
