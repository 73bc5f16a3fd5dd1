"""Full precision: the row every other is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from starquant.methods.base import Card, Fitted, Method
from starquant.spec import BitsSpec, MethodOptions

if TYPE_CHECKING:
    from starquant.models.base import MaskedDiffusionModel
    from starquant.records.manifest import ManifestEntry


class FullPrecisionOptions(MethodOptions):
    """No options."""

    name: Literal["none"]


class FullPrecision(Method[FullPrecisionOptions]):
    """Leave the model as it is; the manifest says so for every part."""

    card = Card(reference="-", needs_calibration=False, transforms=False)
    Options = FullPrecisionOptions

    def fit(self, model: MaskedDiffusionModel, bits: BitsSpec) -> Fitted:
        """Learn nothing."""
        return Fitted()

    def apply(
        self, model: MaskedDiffusionModel, fitted: Fitted, bits: BitsSpec, progress: bool = False
    ) -> list[ManifestEntry]:
        """Change nothing; `bits` are those of the canonical full-precision run."""
        from starquant.runtime import install

        return install(model, bits)
