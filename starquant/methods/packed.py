"""A packed checkpoint as it is: quantized already, whatever made it."""

from __future__ import annotations

from starquant.config.bits import BitsSpec
from starquant.config.methods.packed import PackedOptions
from starquant.errors import ConfigError
from starquant.methods.base import Method
from starquant.methods.fitted import Fitted
from starquant.models.base import MaskedDiffusionModel
from starquant.quantized.manifest import manifest_of
from starquant.session.progress import SILENT, Progress
from starquant.store.manifest import ManifestEntry


class PackedCheckpoint(Method[PackedOptions]):
    """Leave a packed model as it is; the manifest says what it consists of."""

    def apply(
        self,
        model: MaskedDiffusionModel,
        fitted: Fitted,
        bits: BitsSpec,
        progress: Progress = SILENT,
        packed: bool = False,
    ) -> list[ManifestEntry]:
        """Change nothing.

        Raises:
            ConfigError: a model at full precision.
        """
        if not model.quantized:
            raise ConfigError("method=packed: the model is at full precision; allowed: a packed checkpoint")
        return manifest_of(model)
