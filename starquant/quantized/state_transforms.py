"""Transforms whose action depends on the state of each token, masked or not, in the forward pass at hand.

Shape suffixes: B batch, L sequence, D width, C conditions, N channel blocks, G channels of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.errors import CheckpointError
from starquant.kernels import Affine
from starquant.models.buffers import Float32Buffers
from starquant.models.context import Context
from starquant.numerics import gate_channels, state_indices
from starquant.numerics.token_states import ratio_bins


class SiteTransform(nn.Module):
    """What stands at one site: an inexact correction first, then the exact transform, then the gate; None for nothing.

    Attributes:
        correction: changes what the linears see, to undo what quantization did before (TAC).
        exact: undone in the linears behind it.
        gate: drops channels by token state (SGAT).
    """

    def __init__(
        self, exact: nn.Module | None, correction: nn.Module | None = None, gate: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.correction, self.exact, self.gate = correction, exact, gate

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """Return what is quantized."""
        for step in (self.correction, self.exact, self.gate):
            if step is not None:
                x_BLD = step(x_BLD, context)
        return x_BLD

    def __str__(self) -> str:
        return ", ".join(str(step) for step in (self.correction, self.exact, self.gate) if step is not None)


class StateGate(Float32Buffers):
    """SGAT's 0/1 gate on transformed channels, `numerics.gate_channels`.

    Args:
        width: of the site.
        d_m: channels that only masked tokens use.
        d_u: channels that only unmasked tokens use: all that are not masked, however many states these are.
    """

    keep_SD: Tensor

    def __init__(self, width: int, d_m: int, d_u: int) -> None:
        super().__init__()
        self.width, self.d_m, self.d_u = width, d_m, d_u
        self.register_buffer("keep_SD", gate_channels(width, d_m, d_u))

    def validate(self, name: str) -> None:
        """Judge what was read; raises CheckpointError for channels that are not those of the widths."""
        if not torch.equal(self.keep_SD.cpu().float(), gate_channels(self.width, self.d_m, self.d_u)):
            raise CheckpointError(f"{name}.keep_SD: got other channels than {self} keep")

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """Return the gated channels."""
        return F.embedding(state_indices(context.masked_BL), self.keep_SD.to(x_BLD)).mul_(x_BLD)

    def __str__(self) -> str:
        return f"gates {self.d_m} masked, {self.d_u} unmasked"


class BlockAffine(Float32Buffers):
    """TAC's correction: every run of G channels z becomes z M^T + d, in float32.

    Args:
        matrix_CNGG: M of each condition and channel block.
        shift_CNG: d likewise.

    Conditions are bins x states, the states in the model's order: C = 1 (one map), S (one a token state), or S x bins.
    """

    matrix_CNGG: Tensor
    shift_CNG: Tensor

    def __init__(self, matrix_CNGG: Tensor, shift_CNG: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix_CNGG", matrix_CNGG.float())
        self.register_buffer("shift_CNG", shift_CNG.float())

    def validate(self, name: str) -> None:
        """Judge what was read; raises CheckpointError for a condition all of whose matrices are zero."""
        if not bool(self.matrix_CNGG.abs().amax((1, 2, 3)).gt(0).all()):
            raise CheckpointError(f"{name}.matrix_CNGG: got a map of zeros")

    def affine(self) -> Affine:
        """Return the one map that there is (C = 1) as kernels take it."""
        return Affine.of(self.matrix_CNGG[0], self.shift_CNG[0])

    def forward(self, z_BLD: Tensor, context: Context | None = None) -> Tensor:
        """Return the corrected attention output."""
        conditions, blocks, size, _ = self.matrix_CNGG.shape
        if conditions == 1:
            z_NTG = z_BLD.float().view(-1, blocks, size).transpose(0, 1)
            mapped_NTG = torch.baddbmm(self.shift_CNG[0][:, None], z_NTG, self.matrix_CNGG[0].mT)
            mapped = mapped_NTG.transpose(0, 1).reshape(*z_BLD.shape[:-1], blocks, size)
        else:
            z = z_BLD.float().unflatten(-1, (blocks, size))
            assert context is not None
            states, state_BL11 = len(context.states), context.state_BL[..., None, None]
            first_B = states * bin_of_context(context, conditions // states)
            mapped = _map(z, self.matrix_CNGG[first_B], self.shift_CNG[first_B])
            for axis in range(1, states):
                of_state = _map(z, self.matrix_CNGG[first_B + axis], self.shift_CNG[first_B + axis])
                mapped = torch.where(state_BL11 == axis, of_state, mapped)
        return mapped.flatten(-2).to(z_BLD.dtype)

    def __str__(self) -> str:
        conditions, _, g = self.shift_CNG.shape
        return f"affine blocks of {g}" + (f", {conditions} conditions" if conditions > 1 else "")


def bin_of_context(context: Context, bins: int) -> Tensor:
    """Return the bin [B] of each row's masked share of visible tokens: bin k holds shares in (k/bins, (k+1)/bins]."""
    return ratio_bins(context.mask_ratio_B, bins)


def _map(z_BLNG: Tensor, matrix_BNGG: Tensor, shift_BNG: Tensor) -> Tensor:
    """Map each row of the batch by its own matrices."""
    return torch.einsum("blng,bnog->blno", z_BLNG, matrix_BNGG) + shift_BNG[:, None]
