"""Full precision: the row every other is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from starquant.config.bits import FULL_PRECISION, BitsSpec
from starquant.config.run import MethodOptions
from starquant.methods.base import Card, Method
from starquant.methods.fitted import Fitted
from starquant.session.progress import SILENT, Progress

if TYPE_CHECKING:
    from starquant.calibration.batches import CalibrationStates
    from starquant.models.base import MaskedDiffusionModel
    from starquant.store.manifest import ManifestEntry


class FullPrecisionOptions(MethodOptions):
    """No options."""

    name: Literal["none"]


class FullPrecision(Method[FullPrecisionOptions]):
    """Leave the model as it is; the manifest says so for every part."""

    card = Card(reference="-", transforms=False)
    Options = FullPrecisionOptions

    def fit(
        self,
        model: MaskedDiffusionModel,
        bits: BitsSpec,
        states: CalibrationStates | None = None,
        into: Fitted | None = None,
        progress: Progress = SILENT,
    ) -> Fitted:
        """Learn nothing."""
        return into if into is not None else Fitted()

    def apply(
        self,
        model: MaskedDiffusionModel,
        fitted: Fitted,
        bits: BitsSpec,
        progress: Progress = SILENT,
        packed: bool = False,
    ) -> list[ManifestEntry]:
        """Change nothing, whatever `bits` say; a packed checkpoint is what it is."""
        from starquant.packed.manifest import packed_manifest
        from starquant.quantized.install import install

        return packed_manifest(model) if model.quantized else install(model, FULL_PRECISION)
