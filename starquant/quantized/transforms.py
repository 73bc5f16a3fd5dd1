"""Transforms of activations that run online.

Each is called with what it transforms and the forward pass's context, which only those conditional on token states
(`state_transforms`) read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from starquant.errors import CheckpointError
from starquant.kernels import Kronecker
from starquant.models.buffers import Float32Buffers
from starquant.models.context import Context
from starquant.numerics import apply_hadamard, apply_kronecker, by_rows, dual, hadamard_pair, hadamard_signs
from starquant.quantized.rewriting import across_heads

#: Largest error of x P P^T against x ~ N(0, 1) for a P stored in float32.
ORTHOGONAL = 1e-3
#: Largest condition number of an invertible matrix: float32 then keeps three digits of what it undoes.
CONDITION = 1e4


class HeadsHadamard(nn.Module):
    """x (H (x) I): mix the channels of equal index of all heads; the output projection holds W (H (x) I)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def kronecker(self, device: torch.device) -> Kronecker:
        """Return the same as a Kronecker product, as kernels take it."""
        return Kronecker(hadamard_signs(self.heads, device), None, 1.0 / math.sqrt(self.heads))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Return the mixed heads, [..., heads * E]."""
        return across_heads(x, self.heads)

    def __str__(self) -> str:
        return f"hadamard across {self.heads} heads"


class HadamardTransform(nn.Module):
    """x H of the last dimension; the linears behind it hold W H (QuaRot, arXiv 2404.00456)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def kronecker(self, device: torch.device) -> Kronecker:
        """Return the same as a Kronecker product, as kernels take it."""
        return Kronecker(*hadamard_pair(self.width, device), 1.0 / math.sqrt(self.width))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Return x H, [..., width]."""
        return by_rows(lambda rows, _: apply_hadamard(rows), x)

    def extra_repr(self) -> str:
        """Show the width."""
        return str(self.width)

    def __str__(self) -> str:
        return f"hadamard {self.width}"


class OrthogonalTransform(Float32Buffers):
    """x P with a dense orthogonal P [width, width], in float32; the linears behind it hold W P."""

    matrix_DD: Tensor

    def __init__(self, matrix_DD: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix_DD", matrix_DD.float())

    def validate(self, name: str) -> None:
        """Judge what was read; raises CheckpointError for a matrix that is not orthogonal."""
        _validate_orthogonal(self.matrix_DD, f"{name}.matrix_DD")

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Return x P, [..., width]."""
        return (x.float() @ self.matrix_DD).to(x.dtype)

    def __str__(self) -> str:
        return f"orthogonal {len(self.matrix_DD)}"


class InvertibleTransform(OrthogonalTransform):
    """x P with a dense invertible P [width, width], in float32; the linears behind it hold W P^-T."""

    def validate(self, name: str) -> None:
        """Judge what was read; raises CheckpointError for a matrix that is not finite or (almost) singular."""
        validate_invertible(self.matrix_DD, f"{name}.matrix_DD")

    def __str__(self) -> str:
        return f"invertible {len(self.matrix_DD)}"


class KroneckerTransform(Float32Buffers):
    """x (A (x) B) with orthogonal A and B, in float32; the linears behind it hold W (A (x) B)."""

    a_MM: Tensor
    b_NN: Tensor

    def __init__(self, a_MM: Tensor, b_NN: Tensor) -> None:
        super().__init__()
        self.register_buffer("a_MM", a_MM.float())
        self.register_buffer("b_NN", b_NN.float())

    def validate(self, name: str) -> None:
        """Judge what was read; raises CheckpointError for factors that are not orthogonal."""
        _validate_orthogonal(self.a_MM, f"{name}.a_MM")
        _validate_orthogonal(self.b_NN, f"{name}.b_NN")

    def kronecker(self, device: torch.device) -> Kronecker:
        """Return the same as kernels take it; its factors are on the module's device."""
        return Kronecker(self.a_MM, self.b_NN)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Return x (A (x) B), [..., M * N]."""
        return by_rows(lambda rows, _: apply_kronecker(rows.float(), self.a_MM, self.b_NN).to(rows.dtype), x)

    def __str__(self) -> str:
        return f"kronecker {len(self.a_MM)} x {len(self.b_NN)}"


class InvertibleKronecker(KroneckerTransform):
    """x (A (x) B) with invertible A and B, in float32; the linears behind it hold W (A (x) B)^-T (FlatQuant).

    Args:
        a_MM: A.
        b_NN: B; None for the identity, on whatever is left of the width.
    """

    b_NN: Tensor | None  # type: ignore[assignment]

    def __init__(self, a_MM: Tensor, b_NN: Tensor | None) -> None:
        Float32Buffers.__init__(self)
        self.register_buffer("a_MM", a_MM.float())
        self.register_buffer("b_NN", None if b_NN is None else b_NN.float())

    def validate(self, name: str) -> None:
        """Judge what was read; raises CheckpointError for factors that are not finite or (almost) singular."""
        validate_invertible(self.a_MM, f"{name}.a_MM")
        if self.b_NN is not None:
            validate_invertible(self.b_NN, f"{name}.b_NN")

    def __str__(self) -> str:
        return f"invertible {len(self.a_MM)} x {'identity' if self.b_NN is None else len(self.b_NN)}"


class KeyTransform(Float32Buffers):
    """k P of every key head and q P^-T of every query head, P invertible [E, E] in float32: q k^T does not change."""

    matrix_EE: Tensor
    dual_EE: Tensor

    def __init__(self, matrix_EE: Tensor, dual_EE: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix_EE", matrix_EE.float())
        self.register_buffer("dual_EE", dual_EE.float().contiguous())

    @classmethod
    def of(cls, matrix_EE: Tensor) -> KeyTransform:
        """Return the transform of P."""
        return cls(matrix_EE, dual(matrix_EE.float()))

    def validate(self, name: str) -> None:
        """Judge what was read; raises CheckpointError for a matrix that is (almost) singular, or another's inverse."""
        validate_invertible(self.matrix_EE, f"{name}.matrix_EE")
        product_EE = self.matrix_EE.double().T @ self.dual_EE.double()
        if not float((product_EE - torch.eye(len(product_EE)).to(product_EE)).abs().max()) <= ORTHOGONAL:
            raise CheckpointError(f"{name}.dual_EE: got a matrix that does not undo matrix_EE")

    def forward(self, k: Tensor, context: Context | None = None) -> Tensor:
        """Return k P, [..., E]."""
        return (k.float() @ self.matrix_EE).to(k.dtype)

    def queries(self, q: Tensor) -> Tensor:
        """Return q P^-T, [..., E]."""
        return (q.float() @ self.dual_EE).to(q.dtype)

    def __str__(self) -> str:
        return f"invertible {len(self.matrix_EE)}"


def validate_invertible(matrix_DD: Tensor, name: str) -> None:
    """Raise CheckpointError unless a matrix is finite and its condition number at most `CONDITION`."""
    if not bool(matrix_DD.isfinite().all()):
        raise CheckpointError(f"{name}: got values that are not finite")
    condition = float(torch.linalg.cond(matrix_DD.double()))
    if not condition <= CONDITION:
        raise CheckpointError(f"{name}: got a matrix of condition number {condition:.2g}, allowed: {CONDITION:g}")


def _validate_orthogonal(matrix_DD: Tensor, name: str) -> None:
    """Judge P by x P P^T = x for a few random rows x, which no other matrix passes but by chance.

    Raises:
        CheckpointError: P is not orthogonal.
    """
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(4, len(matrix_DD), generator=generator, dtype=torch.float64).to(matrix_DD.device)
    p_DD = matrix_DD.double()
    if not float((x_ND @ p_DD @ p_DD.mT - x_ND).abs().max()) <= ORTHOGONAL:  # also where it is no number
        raise CheckpointError(f"{name}: got a matrix that is not orthogonal")
