"""Activations as integers, codes and a grid for each token, and what the kernel that makes them runs in front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starquant.numerics import apply_kronecker, rms_norm


@dataclass(frozen=True)
class TokenStates:
    """What depends on the state of a token: clip ratios, and SGAT's gate (`numerics.gate_channels`).

    Attributes:
        state: of every token, an index on the model's axis of states, integers [...]; 0 is masked.
        d_m: channels of masked tokens only.
        d_u: channels of unmasked tokens only: of every other state.
        clip_S: ratios of each state, on top of the format's: [S], or [S, 2] with one of the largest number and one of
            the smallest; None for none.
    """

    state: Tensor
    d_m: int = 0
    d_u: int = 0
    clip_S: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm in front of everything else (`numerics.rms_norm`).

    Attributes:
        gain_K: in the activations' dtype.
        eps: added to the mean square.
    """

    gain_K: Tensor
    eps: float

    def apply(self, x: Tensor) -> Tensor:
        """Return the normalised rows, in their dtype."""
        return rms_norm(x, self.gain_K, self.eps)


@dataclass(frozen=True)
class Affine:
    """TAC's map of every run of G channels, z M^T + d.

    Attributes:
        columns_GK: column j of M for every channel, float32: what neighbouring threads read lies side by side.
        shift_NG: d of each of the N runs.
    """

    columns_GK: Tensor
    shift_NG: Tensor

    @classmethod
    def of(cls, matrix_NGG: Tensor, shift_NG: Tensor) -> Affine:
        """Return the map of M and d of each run."""
        size = matrix_NGG.shape[-1]
        return cls(matrix_NGG.permute(2, 0, 1).reshape(size, -1).contiguous(), shift_NG.contiguous())

    def apply(self, x_MK: Tensor) -> Tensor:
        """Return the mapped rows, float32."""
        blocks, size = self.shift_NG.shape
        z_NMG = x_MK.float().view(-1, blocks, size).transpose(0, 1)
        transposed_NGG = self.columns_GK.view(size, blocks, size).transpose(0, 1)
        return torch.baddbmm(self.shift_NG[:, None], z_NMG, transposed_NGG).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Kronecker:
    """A transform factor x (A (x) B) of rows.

    Attributes:
        a_MM: A, float32.
        b_NN: B likewise; None for the identity.
        factor: what A and B are multiplied by, so that those of signs are exact in any precision.
    """

    a_MM: Tensor
    b_NN: Tensor | None
    factor: float = 1.0

    def apply(self, x_MK: Tensor) -> Tensor:
        """Return the transformed rows, float32."""
        return apply_kronecker(x_MK.float(), self.a_MM, self.b_NN).mul_(self.factor)


@dataclass(frozen=True)
class Prologue:
    """What runs on a row in front of its quantization, inside the kernel, in this order; None for nothing.

    The results of each are rounded to the activations' dtype, as without kernels.

    Attributes:
        affine: TAC.
        kronecker: an exact transform that linears undo.
        states: gate and clip ratios by token state.
    """

    affine: Affine | None = None
    kronecker: Kronecker | None = None
    states: TokenStates | None = None


NO_PROLOGUE = Prologue()


@dataclass(frozen=True)
class IntegerTokens:
    """What the linears of a site read.

    Attributes:
        codes: int8 [..., K].
        scale: float32 [..., 1].
        dtype: of the activations, and of what comes out of a linear.
        products: of the linears that the site multiplies as one, [..., O] each, in their order; empty where each
            linear multiplies by itself.
        zero: zero point int32 [..., 1], moved as the codes are (`kernels.offsets`); None on a symmetric grid.
        sum: of the codes, int32 [..., 1]; None where no linear that reads them is asymmetric.
    """

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype
    products: tuple[Tensor, ...] = ()
    zero: Tensor | None = None
    sum: Tensor | None = None

    def __getitem__(self, rows: Any) -> IntegerTokens:
        """Return some tokens, by an index of their leading dimensions (experts of a mixture read theirs)."""
        products = tuple([product[rows] for product in self.products])
        zero, total = (None if t is None else t[rows] for t in (self.zero, self.sum))
        return IntegerTokens(self.codes[rows], self.scale[rows], self.dtype, products, zero, total)
