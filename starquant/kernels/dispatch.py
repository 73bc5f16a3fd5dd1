"""Which implementation runs: Triton where the tensors are on a GPU and Triton is there, else the reference.

torch.compile sees each as one operation of its own (`starquant::...`), whose inside it leaves alone. Triton is an extra
that may be absent: its kernels are imported where one is launched.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from starquant.errors import DeviceError
from starquant.kernels import reference, row_chunks
from starquant.kernels.offsets import Offsets
from starquant.kernels.tokens import NO_PROLOGUE, Affine, IntegerTokens, Kronecker, Norm, Prologue, TokenStates

#: Compute capability from which int8 tensor cores multiply what the kernels hand them.
NEEDED = (8, 0)
HAS_TRITON = find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """Return whether kernels run for a tensor: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""
    return HAS_TRITON and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def launched_on(x: Tensor) -> AbstractContextManager[object]:
    """Launch on a tensor's own GPU, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def validate_tensor_cores(device: torch.device) -> None:
    """Refuse a GPU on which a model cannot run its integer path; other devices pass.

    Raises:
        DeviceError: a GPU without the tensor cores that the kernels use.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < NEEDED:
        raise DeviceError(
            f"{torch.cuda.get_device_name(device)}: compute capability {capability[0]}.{capability[1]} has no int8 "
            f"tensor cores that the integer path can use; needed: {NEEDED[0]}.{NEEDED[1]}"
        )


def quantize_tokens(
    x: Tensor,
    bits: int,
    clip_ratio: float = 1.0,
    prologue: Prologue = NO_PROLOGUE,
    symmetric: bool = True,
    sums: bool = False,
    front: Tensor | Norm | None = None,
) -> IntegerTokens:
    """Quantize activations [..., K] per token on a grid of at most 8 bits, behind a prologue.

    Args:
        x: activations.
        bits: of a code.
        clip_ratio: of the grid.
        prologue: what runs in front.
        symmetric: whether the grid is.
        sums: with the sum of each token's codes, which asymmetric weights need.
        front: before anything else: SwiGLU's gate, [..., K], by whose silu activations are multiplied, or a norm.
    """
    affine, kronecker, states = prologue.affine, prologue.kronecker, prologue.states
    flat = (
        None if affine is None else affine.columns_GK,
        None if affine is None else affine.shift_NG,
        None if kronecker is None else kronecker.a_MM,
        None if kronecker is None else kronecker.b_NN,
        1.0 if kronecker is None else kronecker.factor,
        None if states is None else states.state.expand(x.shape[:-1]).reshape(-1),
        0 if states is None else states.d_m,
        0 if states is None else states.d_u,
        None if states is None else states.clip_S,
        front.reshape(-1, x.shape[-1]) if isinstance(front, Tensor) else None,
        front.gain_K if isinstance(front, Norm) else None,
        front.eps if isinstance(front, Norm) else 0.0,
    )
    run = _quantize_op if torch.compiler.is_compiling() else _quantize
    codes, *per_token = run(x.reshape(-1, x.shape[-1]), bits, clip_ratio, symmetric, sums, *flat)
    scale, *offsets = (part.view(*x.shape[:-1], 1) for part in per_token)
    zero, total = None if symmetric else offsets[0], offsets[-1] if sums else None
    return IntegerTokens(codes.view(x.shape), scale, x.dtype, (), zero, total)


def integer_linear(
    x: IntegerTokens,
    codes: Tensor,
    scale_O1: Tensor,
    bits: int,
    bias_O: Tensor | None,
    offsets_O2: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return the product of integer tokens and packed weights, [..., O], in the tokens' dtype.

    Args:
        x: codes [..., K] and token scales.
        codes: as `quantized.packed_linear` stores them.
        scale_O1: float32, one a channel.
        bits: of the weight.
        bias_O: None for none.
        offsets_O2: `kernels.offsets.weight_offsets`; needed where the tokens' or the weight's grid is asymmetric.
        residual: [..., O] in the tokens' dtype, which the product is added to; None for nothing.
    """
    rows_MK, token_M1 = x.codes.reshape(-1, x.codes.shape[-1]), x.scale.reshape(-1, 1)
    zero_M1, sum_M1 = (None if t is None else t.reshape(-1, 1) for t in (x.zero, x.sum))
    run = _linear_op if torch.compiler.is_compiling() else _linear
    flat = None if residual is None else residual.reshape(-1, len(codes))
    y_MO = run(rows_MK, token_M1, codes, scale_O1, bits, bias_O, zero_M1, sum_M1, offsets_O2, flat, x.dtype)
    return y_MO.view(*x.codes.shape[:-1], len(codes))


def value_linear(
    x: Tensor, codes: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, bias_O: Tensor | None
) -> Tensor:
    """Return the product of activations as they are and the values that packed weights stand for, [..., O]; on a CPU.

    Args:
        x: [..., K].
        codes: as `quantized.packed_linear` stores them.
        scale_OG: float32, one a channel or group.
        zero_OG: float32 zero points; None where the grid is symmetric.
        bits: of the weight.
        bias_O: None for none.
    """
    op = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    run = _value_op if op else row_chunks.value_linear
    y_MO = run(x.reshape(-1, x.shape[-1]), codes, scale_OG, zero_OG, bits, bias_O)
    return y_MO.view(*x.shape[:-1], len(codes))


def mixed_linear(
    x: Tensor, codes: Tensor, scale_O1: Tensor, bits: int, bias_O: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """Return the product of activations as they are and packed weights (W4A16); as `integer_linear`, by Triton only."""
    run = _mixed_op if torch.compiler.is_compiling() else _mixed
    flat = None if residual is None else residual.reshape(-1, len(codes))
    y_MO = run(x.reshape(-1, x.shape[-1]), codes, scale_O1, bits, bias_O, flat)
    return y_MO.view(*x.shape[:-1], len(codes))


def _quantize(
    x_MK: Tensor,
    bits: int,
    clip_ratio: float,
    symmetric: bool,
    sums: bool,
    columns_GK: Tensor | None,
    shift_NG: Tensor | None,
    a_MM: Tensor | None,
    b_NN: Tensor | None,
    factor: float,
    state_M: Tensor | None,
    d_m: int,
    d_u: int,
    clip_S: Tensor | None,
    gate_MK: Tensor | None,
    gain_K: Tensor | None,
    eps: float,
) -> list[Tensor]:
    affine = None if columns_GK is None or shift_NG is None else Affine(columns_GK, shift_NG)
    kronecker = None if a_MM is None else Kronecker(a_MM, b_NN, factor)
    prologue = Prologue(affine, kronecker, None if state_M is None else TokenStates(state_M, d_m, d_u, clip_S))
    validate_tensor_cores(x_MK.device)
    front = gate_MK if gain_K is None else Norm(gain_K, eps)
    if front is not None and (affine is not None or x_MK.dtype == torch.float32 or not uses_triton(x_MK)):
        x_MK, front = front.apply(x_MK) if isinstance(front, Norm) else F.silu(front) * x_MK, None
    if not uses_triton(x_MK):
        quantize = row_chunks.quantize_rows if x_MK.device.type == "cpu" else reference.quantize_rows
        return [*quantize(x_MK, bits, clip_ratio, prologue, symmetric, sums)]
    from starquant.kernels.triton.quantize import quantize_rows

    with launched_on(x_MK):
        return [*quantize_rows(x_MK, bits, clip_ratio, prologue, symmetric, sums, front)]


def _linear(
    x_MK: Tensor,
    x_scale_M1: Tensor,
    codes: Tensor,
    scale_O1: Tensor,
    bits: int,
    bias_O: Tensor | None,
    x_zero_M1: Tensor | None,
    x_sum_M1: Tensor | None,
    offsets_O2: Tensor | None,
    residual_MO: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    offsets = None
    if x_zero_M1 is not None or x_sum_M1 is not None:
        assert offsets_O2 is not None
        offsets = Offsets(offsets_O2, x_zero_M1, x_sum_M1)
    if x_MK.device.type == "cpu" and not uses_triton(x_MK):
        y_MO = row_chunks.integer_linear(x_MK, x_scale_M1, codes, scale_O1[:, 0], bits, bias_O, dtype, offsets)
        return y_MO if residual_MO is None else residual_MO + y_MO
    if not uses_triton(x_MK):
        sums_MO = reference.accumulate(x_MK, reference.weight_codes(codes, bits))
        if offsets is not None:
            offsets.subtract(sums_MO)
        y_MO = reference.scaled(sums_MO, x_scale_M1, scale_O1[:, 0], bias_O, dtype)
        return y_MO if residual_MO is None else residual_MO + y_MO
    from starquant.kernels.triton.linear import linear

    with launched_on(x_MK):
        return linear(x_MK, x_scale_M1, codes, scale_O1[:, 0], bits, bias_O, dtype, None, offsets, residual_MO)


def _mixed(
    x_MK: Tensor, codes: Tensor, scale_O1: Tensor, bits: int, bias_O: Tensor | None, residual_MO: Tensor | None
) -> Tensor:
    from starquant.kernels.triton.linear import linear_16

    with launched_on(x_MK):
        return linear_16(x_MK, codes, scale_O1[:, 0], bits, bias_O, None, residual_MO)


_quantize_op = torch.library.custom_op("starquant::quantize_tokens", _quantize, mutates_args=())
_linear_op = torch.library.custom_op("starquant::integer_linear", _linear, mutates_args=())
_mixed_op = torch.library.custom_op("starquant::mixed_linear", _mixed, mutates_args=())
_value_op = torch.library.custom_op("starquant::value_linear", row_chunks.value_linear, mutates_args=())


@_quantize_op.register_fake
def _(x_MK: Tensor, _: int, __: float, symmetric: bool, sums: bool, *___: object) -> list[Tensor]:
    kinds = [torch.float32] + [torch.int32] * (int(not symmetric) + int(sums))
    per_token = [x_MK.new_empty((x_MK.shape[0], 1), dtype=kind) for kind in kinds]
    return [x_MK.new_empty(x_MK.shape, dtype=torch.int8), *per_token]


@_linear_op.register_fake
def _(x_MK: Tensor, _: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return x_MK.new_empty((x_MK.shape[0], codes.shape[0]), dtype=rest[-1])


@_mixed_op.register_fake
@_value_op.register_fake
def _(x_MK: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x_MK.new_empty((x_MK.shape[0], codes.shape[0]))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.weight = inputs[1:5]


def _gradient(ctx: Any, gradient_MO: Tensor) -> tuple[Tensor | None, ...]:
    return row_chunks.value_linear_gradient(gradient_MO, *ctx.weight), None, None, None, None, None


_value_op.register_autograd(_gradient, setup_context=_keep_weight)
