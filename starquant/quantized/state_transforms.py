"""Transforms whose action depends on the state of each token, masked or not, in the forward pass at hand.

Shape suffixes: B batch, L sequence, D width, C conditions, N channel blocks, G channels of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.errors import CheckpointError
from starquant.kernels import Affine
from starquant.models.buffers import Float32Buffers
from starquant.models.context import Context


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
        self.folded: Any = None  # correction and exact transform as one map, once made (`quantized.folding`)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """Return what is quantized."""
        for step in (self.correction, self.exact, self.gate):
            if step is not None:
                x_BLD = step(x_BLD, context)
        return x_BLD

    def __str__(self) -> str:
        return ", ".join(str(step) for step in (self.correction, self.exact, self.gate) if step is not None)


class StateGate(Float32Buffers):
    """SGAT's 0/1 gate on transformed channels [shared | masked | unmasked].

    Masked tokens keep the first two parts, all others the first and the last: one weight serves both (STaR-Quant,
    arXiv 2606.04945, SGAT: G_m and G_u).

    Args:
        width: of the site.
        masked: d_m, channels that only masked tokens use.
        unmasked: d_u, channels that only the other tokens use.
    """

    def __init__(self, width: int, masked: int, unmasked: int) -> None:
        super().__init__()
        self.width, self.masked, self.unmasked = width, masked, unmasked
        self.register_buffer("keep_SD", self._channels())

    def _channels(self) -> Tensor:
        shared = self.width - self.masked - self.unmasked
        keep_SD = torch.ones(2, self.width, dtype=torch.float32)  # S: other tokens, masked
        keep_SD[0, shared : shared + self.masked] = 0.0
        keep_SD[1, shared + self.masked :] = 0.0
        return keep_SD

    def check(self, name: str) -> None:
        """Judge what was read; raises CheckpointError for channels that are not those of the widths."""
        if not torch.equal(self.keep_SD.cpu().float(), self._channels()):
            raise CheckpointError(f"{name}.keep_SD: got other channels than {self} keep")

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """Return the gated channels."""
        return F.embedding(context.state_BL, self.keep_SD.to(x_BLD)).mul_(x_BLD)

    def __str__(self) -> str:
        return f"gates {self.masked} masked, {self.unmasked} unmasked"


class BlockAffine(Float32Buffers):
    """TAC's correction: every run of G channels z becomes z M^T + d, in float32.

    Args:
        matrix_CNGG: M of each condition and channel block.
        shift_CNG: d likewise.

    Conditions are bins x states, masked first: C = 1 (one map), 2 (one a token state), or 2 x bins.
    """

    def __init__(self, matrix_CNGG: Tensor, shift_CNG: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix_CNGG", matrix_CNGG.float())
        self.register_buffer("shift_CNG", shift_CNG.float())
        self._kept: Affine | None = None

    def affine(self) -> Affine:
        """Return the one map that there is (C = 1) as kernels take it, kept beside the module."""
        matrix_NGG, shift_NG = self.matrix_CNGG[0], self.shift_CNG[0]
        if self._kept is None or self._kept.columns_GK.device != matrix_NGG.device:
            self._kept = torch.compiler.disable(_outside)(matrix_NGG, shift_NG)
        return self._kept

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
            bin_B = bin_of_context(context, conditions // 2)
            masked, other = (_map(z, self.matrix_CNGG[2 * bin_B + s], self.shift_CNG[2 * bin_B + s]) for s in (0, 1))
            mapped = torch.where(context.masked_BL[..., None, None], masked, other)
        return mapped.flatten(-2).to(z_BLD.dtype)

    def __str__(self) -> str:
        conditions, _, g = self.shift_CNG.shape
        return f"affine blocks of {g}" + (f", {conditions} conditions" if conditions > 1 else "")


def _outside(matrix_NGG: Tensor, shift_NG: Tensor) -> Affine:
    with torch.inference_mode(False):  # what is kept must serve other passes too
        return Affine.of(matrix_NGG, shift_NG.clone())


def bin_of_context(context: Context, bins: int) -> Tensor:
    """Return the bin [B] of each row's masked share of visible tokens: bin k holds shares in (k/bins, (k+1)/bins]."""
    return (context.mask_ratio_B * bins - 1e-6).ceil().long().sub_(1).clamp_(0, bins - 1)


def _map(z_BLNG: Tensor, matrix_BNGG: Tensor, shift_BNG: Tensor) -> Tensor:
    """Map each row of the batch by its own matrices."""
    return torch.einsum("blng,bnog->blno", z_BLNG, matrix_BNGG) + shift_BNG[:, None]
