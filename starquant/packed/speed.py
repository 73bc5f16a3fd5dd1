"""What a packed model says where it is loaded on a GPU that runs it more slowly than bf16."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

log = logging.getLogger(__name__)

#: (bits of weights, of activations) -> speed of a forward of 1,024 tokens, bf16's being 1: LLaDA-8B on one H100, CUDA
#: graphs, kernels of commit afb57db (results/published/efficiency).
MEASURED = {(8, 8): 0.75, (4, 16): 0.64}
#: Tokens of a pass from which both were behind bf16 there.
SLOWER_FROM = 128


def note_speed(bits: Mapping[str, Any], device: torch.device) -> None:
    """Say from how many tokens on bf16 was faster on the card that was measured, if it was.

    Args:
        bits: of a checkpoint (`PackedConfig.bits`).
        device: where it is loaded.
    """
    pair = tuple([_bits_of(bits.get(name)) for name in ("weights", "activations")])
    if device.type == "cuda" and pair in MEASURED:
        log.warning(
            "W%dA%d on a GPU: from %d tokens a pass on bf16 was faster on the one card that was measured (H100, "
            "kernels of afb57db, %.2fx bf16's speed at 1,024 tokens: docs/packed.md)",
            *pair,
            SLOWER_FROM,
            MEASURED[pair],
        )


def _bits_of(part: Any) -> int | None:
    bits = part.get("bits") if isinstance(part, Mapping) else None
    return bits if isinstance(bits, int) else None
