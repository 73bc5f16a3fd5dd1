"""RTN: round weights and activations to the nearest grid point, with no calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from starquant.methods.base import Card, Fitted, Method
from starquant.spec import BitsSpec, MethodOptions

if TYPE_CHECKING:
    from starquant.models.base import MaskedDiffusionModel
    from starquant.records.manifest import ManifestEntry


class RTNOptions(MethodOptions):
    """No options: grids, granularity and clipping belong to `bits`."""

    name: Literal["rtn"]


class RTN(Method[RTNOptions]):
    """Round-to-nearest."""

    card = Card(reference="baseline of arXiv 2606.04945, table 1", needs_calibration=False, transforms=False)
    Options = RTNOptions

    def fit(self, model: MaskedDiffusionModel, bits: BitsSpec) -> Fitted:
        """Learn nothing."""
        return Fitted()

    def apply(
        self, model: MaskedDiffusionModel, fitted: Fitted, bits: BitsSpec, progress: bool = False
    ) -> list[ManifestEntry]:
        """Round every declared linear and install the quantizers of activations and attention operands."""
        from starquant.runtime import install, round_to_nearest

        return install(model, bits, round_to_nearest, progress)
