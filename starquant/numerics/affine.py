"""Block-diagonal affine maps that bring quantized vectors back to exact ones, from first and second moments.

z is exact, q its quantized counterpart; channels are cut into N blocks of G. Moments are streamed in float64.
Shapes: T tokens, N blocks, G channels of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.errors import ConfigError, DataError
from starquant.numerics.moments import validate_finite_tensor

#: Variance, relative to what it is compared with, below which a block of quantized channels counts as constant.
_CONSTANT = 1e-8


class PairMoments:
    """Sums of z, q, z z^T, z q^T and q q^T of every block, [N, G] and [N, G, G]."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.count = 0
        self._sums: tuple[Tensor, ...] | None = None

    def update(self, z_TD: Tensor, q_TD: Tensor) -> None:
        """Add tokens.

        Raises:
            ConfigError: a width that the block size does not divide.
            DataError: values that are not finite.
        """
        width = z_TD.shape[1]
        if width % self.block_size:
            raise ConfigError(f"block size: got {self.block_size}, which does not divide the width {width}")
        for x in (z_TD, q_TD):
            validate_finite_tensor(x, "attention output")
        z, q = (x.detach().double().unflatten(1, (-1, self.block_size)).transpose(0, 1) for x in (z_TD, q_TD))
        sums = (z.sum(1), q.sum(1), z.mT @ z, z.mT @ q, q.mT @ q)
        self._sums = sums if self._sums is None else tuple(a + b for a, b in zip(self._sums, sums, strict=True))
        self.count += len(z_TD)

    def merge(self, other: PairMoments) -> None:
        """Add everything that `other` has seen."""
        if other._sums is not None:
            mine = self._sums or tuple(torch.zeros_like(x) for x in other._sums)
            self._sums = tuple(a + b for a, b in zip(mine, other._sums, strict=True))
            self.count += other.count

    def pooled(self, of: int, width: int) -> PairMoments:
        """Return moments whose blocks are shared by runs of `of` neighbouring heads of `width` channels each."""
        shared = PairMoments(self.block_size)
        assert self._sums is not None
        inside = width // self.block_size

        def pool(x: Tensor) -> Tensor:
            heads = x.unflatten(0, (-1, of, inside))
            shared_heads: Tensor = heads.sum(1, keepdim=True).expand_as(heads).flatten(0, 2)
            return shared_heads

        shared._sums, shared.count = tuple(pool(x) for x in self._sums), self.count * of
        return shared

    def central(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return means of z and q [N, G], covariances of z, of z with q, and of q [N, G, G].

        Raises:
            DataError: fewer than two tokens.
        """
        if self._sums is None or self.count < 2:
            raise DataError(f"affine correction: got {self.count} tokens, needed: two or more")
        mean_z, mean_q, zz, zq, qq = (x / self.count for x in self._sums)
        outer = [a[..., :, None] * b[..., None, :] for a, b in ((mean_z, mean_z), (mean_z, mean_q), (mean_q, mean_q))]
        return mean_z, mean_q, zz - outer[0], zq - outer[1], qq - outer[2]


def moment_matching(
    moments: PairMoments, damping: float, smoothing: float = 0.0, shrinkage: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (M [N, G, G], d [N, G]) such that M q + d has the mean and, up to damping, the covariance of z.

    M = C^1/2 K^-1/2 with C, K the covariances of z and q, each damped by `damping` times its mean variance; singular
    values s of M become 1 + (1 - smoothing)(s - 1), then M becomes (1 - shrinkage) M + shrinkage I. d = E[z] - M E[q].
    A block of q that (almost) never varies keeps M = I: there is nothing to spread.
    (STaR-Quant, arXiv 2606.04945, TAC; the forms of smoothing and shrinkage are ours.)
    """
    mean_z, mean_q, zz, _, qq = moments.central()
    matrix = symmetric_power(_damped(zz, damping), 0.5) @ symmetric_power(_damped(qq, damping), -0.5)
    if smoothing:
        u, s, v = torch.linalg.svd(matrix)
        matrix = u @ torch.diag_embed(1 + (1 - smoothing) * (s - 1)) @ v
    spread, size = _variance(qq), _variance(zz) + mean_q.square().mean(-1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where((spread <= _CONSTANT * size)[:, None, None], identity, matrix)
    return _finished(matrix, mean_z, mean_q, shrinkage)


def ridge_least_squares(moments: PairMoments, damping: float, shrinkage: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return (M, d) that minimise E|z - M q - d|^2 + l |M - I|^2, l = damping x mean variance of q; then shrunk."""
    mean_z, mean_q, _, zq, qq = moments.central()
    identity = torch.eye(qq.shape[-1], dtype=qq.dtype, device=qq.device)
    ridge = _level(qq, damping) * identity
    matrix = torch.linalg.solve(qq + ridge, zq + ridge, left=False)
    return _finished(matrix, mean_z, mean_q, shrinkage)


def _finished(matrix: Tensor, mean_z: Tensor, mean_q: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    matrix = (1 - shrinkage) * matrix + shrinkage * identity
    return matrix, mean_z - (matrix @ mean_q[..., None])[..., 0]


def _level(covariance: Tensor, damping: float) -> Tensor:
    """Return damping x mean variance, [N, 1, 1]; a block without variance gets one that keeps it invertible."""
    return (damping * _variance(covariance)[..., None, None]).clamp_min(1e-12)


def _variance(covariance: Tensor) -> Tensor:
    mean: Tensor = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    return mean


def _damped(covariance: Tensor, damping: float) -> Tensor:
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return covariance + _level(covariance, damping) * identity


def symmetric_power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of symmetric positive definite matrices."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    floor = eigenvalues[..., -1:] * torch.finfo(eigenvalues.dtype).eps
    power: Tensor = (vectors * eigenvalues.clamp_min(floor).pow(exponent)[..., None, :]) @ vectors.mT
    return power
