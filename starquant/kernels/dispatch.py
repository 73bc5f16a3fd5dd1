"""Which implementation runs: Triton where the tensors are on a GPU and Triton is there, else the reference."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from starquant.errors import DeviceError
from starquant.kernels import reference
from starquant.kernels.tokens import NOTHING, Before, IntegerTokens

#: Compute capability from which int8 tensor cores multiply what the kernels hand them.
NEEDED = (8, 0)


@functools.cache
def has_triton() -> bool:
    """Return whether Triton can be imported."""
    return find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """Return whether kernels run for a tensor: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""
    return has_triton() and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Launch on a tensor's own GPU, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def check_device(device: torch.device) -> None:
    """Judge a device before a model runs its integer path there.

    Raises:
        DeviceError: a GPU without the tensor cores that the kernels use.
    """
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < NEEDED:
        raise DeviceError(
            f"{torch.cuda.get_device_name(device)}: compute capability {found[0]}.{found[1]} has no int8 tensor cores "
            f"that the integer path can use; needed: {NEEDED[0]}.{NEEDED[1]}"
        )


def quantize_tokens(
    x: Tensor, bits: int, clip: Tensor | None = None, clip_ratio: float = 1.0, before: Before = NOTHING
) -> IntegerTokens:
    """Quantize activations [..., K] per token on a symmetric grid of at most 8 bits; `clip` is [..., 1]."""
    if before.gate is not None:
        masked_M = before.gate.masked.expand(x.shape[:-1]).reshape(-1)
        before = replace(before, gate=replace(before.gate, masked=masked_M))
    rows_MK = x.reshape(-1, x.shape[-1])
    clip_M1 = None if clip is None else clip.reshape(-1, 1).float()
    if uses_triton(x):
        from starquant.kernels.triton_quantize import quantize_rows

        with _on(x):
            codes, scale = quantize_rows(rows_MK, bits, clip_M1, clip_ratio, before)
    else:
        codes, scale = reference.quantize_rows(rows_MK, bits, clip_M1, clip_ratio, before)
    return IntegerTokens(codes.view(x.shape), scale.view(*x.shape[:-1], 1), x.dtype)


def integer_linear(x: IntegerTokens, codes: Tensor, scale_O1: Tensor, bits: int, bias_O: Tensor | None) -> Tensor:
    """Return the product of integer tokens and packed weights, [..., O], in the tokens' dtype.

    Args:
        x: codes [..., K] and token scales.
        codes: as `runtime.packed` stores them.
        scale_O1: float32, one a channel.
        bits: of the weight.
        bias_O: None for none.
    """
    rows_MK, token_M1 = x.codes.reshape(-1, x.codes.shape[-1]), x.scale.reshape(-1, 1)
    if uses_triton(rows_MK):
        from starquant.kernels.triton_linear import linear

        with _on(rows_MK):
            y_MO = linear(rows_MK, token_M1, codes, scale_O1[:, 0], bits, bias_O, x.dtype)
    else:
        sums_MO = reference.accumulate(rows_MK, reference.weight_codes(codes, bits))
        y_MO = reference.scaled(sums_MO, token_M1, scale_O1[:, 0], bias_O, x.dtype)
    return y_MO.view(*x.codes.shape[:-1], len(codes))


def mixed_linear(x: Tensor, codes: Tensor, scale_O1: Tensor, bits: int, bias_O: Tensor | None) -> Tensor:
    """Return the product of activations as they are and packed weights (W4A16); as `integer_linear`, by Triton only."""
    from starquant.kernels.triton_linear import linear_16

    with _on(x):
        y_MO = linear_16(x.reshape(-1, x.shape[-1]), codes, scale_O1[:, 0], bits, bias_O)
    return y_MO.view(*x.shape[:-1], len(codes))
