"""What a method did to a model, entry by entry."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class ManifestEntry(BaseModel):
    """One linear, router, attention operand, embedding or head.

    Attributes:
        name: qualified module name (operands: attention's name and q, k, p or v).
        role: the linear's or operand's role in its block.
        block: index of the block, None outside.
        weight_bits: bits of the weight, None for operands.
        activation_bits: bits of the input (or of the operand).
        site: name of the input site that quantizes the activations.
        weight_sqnr_db: signal over quantization noise of the weight; None if nothing was lost.
        activation_sqnr_db: the same for the activations, on the probe of `quantized.probe`.
        transform: what the activations pass through online before they are rounded, None for nothing.
        reason: why it was left at full precision, None if it was not.
        calibration: what stands in for statistics of its own, None where it has them or needs none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["linear", "router", "operand", "embedding", "head"]
    role: str
    block: int | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    site: str | None = None
    weight_sqnr_db: float | None = None
    activation_sqnr_db: float | None = None
    transform: str | None = None
    reason: str | None = None
    calibration: str | None = None
