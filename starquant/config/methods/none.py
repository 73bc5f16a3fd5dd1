"""Full precision: nothing to choose."""

from __future__ import annotations

from typing import ClassVar, Literal

from starquant.config.methods.base import MethodOptions


class FullPrecisionOptions(MethodOptions):
    """No options."""

    reference: ClassVar[str] = "-"
    transforms: ClassVar[bool] = False

    algorithm: Literal["none"] = "none"
