"""Full precision: the row every other is compared with."""

from __future__ import annotations

from starquant.config.bits import FULL_PRECISION, BitsSpec
from starquant.config.methods.none import FullPrecisionOptions
from starquant.methods.base import Method
from starquant.methods.fitted import Fitted
from starquant.models.base import MaskedDiffusionModel
from starquant.quantized.install import install
from starquant.session.progress import SILENT, Progress
from starquant.store.manifest import ManifestEntry


class FullPrecision(Method[FullPrecisionOptions]):
    """Leave the model as it is; the manifest says so for every part."""

    def apply(
        self,
        model: MaskedDiffusionModel,
        fitted: Fitted,
        bits: BitsSpec,
        progress: Progress = SILENT,
        packed: bool = False,
    ) -> list[ManifestEntry]:
        """Change nothing, whatever `bits` say; raises ConfigError for a model that is quantized already."""
        return install(model, FULL_PRECISION)
