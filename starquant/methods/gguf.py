"""A GGUF as it is: llama.cpp computes it, and the checkpoint beside it stays at full precision."""

from __future__ import annotations

from starquant.config.bits import BitsSpec
from starquant.config.methods.gguf import GGUFOptions
from starquant.methods.base import Method
from starquant.methods.fitted import Fitted
from starquant.models.base import MaskedDiffusionModel
from starquant.session.progress import SILENT, Progress
from starquant.store.manifest import ManifestEntry


class GGUFFile(Method[GGUFOptions]):
    """Leave the checkpoint alone."""

    def apply(
        self,
        model: MaskedDiffusionModel,
        fitted: Fitted,
        bits: BitsSpec,
        progress: Progress = SILENT,
        packed: bool = False,
    ) -> list[ManifestEntry]:
        """Change nothing."""
        return []
