"""A GGUF as it is."""

from __future__ import annotations

from typing import ClassVar, Literal

from starquant.config.methods.base import MethodOptions


class GGUFOptions(MethodOptions):
    """No options."""

    reference: ClassVar[str] = "-"
    transforms: ClassVar[bool] = True

    algorithm: Literal["gguf"] = "gguf"
