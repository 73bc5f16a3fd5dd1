"""The forward process: replace tokens by [MASK]."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def forward_mask(ids_BL: Tensor, mask_ratio: float, mask_id: int, generator: torch.Generator) -> Tensor:
    """Mask every token independently with probability `mask_ratio` (LLaDA, eq. 1).

    Args:
        ids_BL: token ids.
        mask_ratio: t in [0, 1].
        mask_id: id of [MASK].
        generator: source of randomness, on the CPU.

    Returns:
        Noised ids [B, L], on the device of `ids_BL`.

    Raises:
        ValueError: a mask ratio outside [0, 1].
    """
    if not 0.0 <= mask_ratio <= 1.0:
        raise ValueError(f"mask_ratio must lie in [0, 1], got {mask_ratio}")
    masked_BL = torch.rand(ids_BL.shape, generator=generator) < mask_ratio
    return ids_BL.masked_fill(masked_BL.to(ids_BL.device), mask_id)


def seeded_generator(seed: int, purpose: str, *token_ids: Iterable[int], device: str = "cpu") -> torch.Generator:
    """Return a generator whose draws depend on the seed and the request's own tokens, never on its batch."""
    text = f"{seed}/{purpose}/" + "/".join(",".join(map(str, ids)) for ids in token_ids)
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
