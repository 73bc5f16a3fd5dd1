"""A closed-form invertible map in front of P, that balances what rounding costs on both sides of a product.

Rounding x A Q and W A^-T Q costs about tr(A^T S A) tr(A^-1 H A^-T), whatever the orthogonal Q spreads evenly: S is the
second moment of x, each token state's divided by the energy of its outputs, H = W^T W. The least is at
A A^T = S^-1/2 (S^1/2 H S^1/2)^1/2 S^-1/2, the geometric mean of S^-1 and H; A is its symmetric root. Of a Kronecker
product A_1 (x) A_2 each factor has the same closed form while the other stands, in turn.

S is shrunk towards a multiple of the identity, by as much as its sampling error asks for (Ledoit and Wolf, 2004): few
tokens would else promise directions without energy, which other tokens have.

Shapes: N rows, D = M K width of the site, O outputs of all linears that read it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from starquant.methods.star_quant.base_transform import Group, Transform
from starquant.numerics import SecondMoment, symmetric_power

DAMPING = 1e-3  # of both second moments, as a share of their mean eigenvalue; our choice
ROUNDS = 4  # over both factors; our choice
ROWS_AT_ONCE = 256


def balanced(second_DD: Tensor, weight_DD: Tensor) -> Tensor:
    """Return the symmetric A of least tr(A^T S A) tr(A^-1 H A^-T), determinant 1, [D, D] in float64.

    Args:
        second_DD: S, symmetric and not negative.
        weight_DD: H, likewise.
    """
    damped = []
    for x_DD in (second_DD.double(), weight_DD.double()):
        mean = x_DD.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        damped.append(x_DD / mean + DAMPING * torch.eye(len(x_DD)).to(x_DD))
    root_DD, inverse_DD = symmetric_power(damped[0], 0.5), symmetric_power(damped[0], -0.5)
    product_DD = inverse_DD @ symmetric_power(root_DD @ damped[1] @ root_DD, 0.5) @ inverse_DD
    a_DD = symmetric_power(product_DD, 0.5)
    unit_DD: Tensor = a_DD / torch.linalg.slogdet(a_DD).logabsdet.div(len(a_DD)).exp()
    return unit_DD


def balanced_factors(rows_NMK: Tensor, weight_OMK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors [M, M] and [K, K] of the Kronecker product of least cost, by alternation, in float64.

    Args:
        rows_NMK: x, weighed so that S is their mean second moment.
        weight_OMK: W.
    """
    left_MM, right_KK = (torch.eye(n, dtype=torch.float64).to(rows_NMK.device) for n in rows_NMK.shape[1:])
    for _ in range(ROUNDS):
        dual_KK = torch.linalg.inv(right_KK)
        left_MM = balanced(_shrunk(rows_NMK @ right_KK), _moment(weight_OMK @ dual_KK))
        dual_MM = torch.linalg.inv(left_MM)
        right_KK = balanced(_shrunk((left_MM @ rows_NMK).mT), _moment((dual_MM @ weight_OMK).mT))
    return left_MM, right_KK


def _moment(x_NMK: Tensor) -> Tensor:
    """Return the mean over N of X X^T, [M, M]."""
    flat_MX = x_NMK.transpose(0, 1).flatten(1)
    return flat_MX @ flat_MX.T / len(x_NMK)


def _shrunk(x_NMK: Tensor) -> Tensor:
    moment_MM = _moment(x_NMK)
    return shrunk(moment_MM, sampling_error(x_NMK, moment_MM))


def sampling_error(x_NMK: Tensor, moment_MM: Tensor) -> float:
    """Return the mean squared (Frobenius) error of a mean of X X^T over N rows, estimated from these."""
    if x_NMK.shape[1] > x_NMK.shape[2]:
        x_NMK = x_NMK.mT  # |X X^T| = |X^T X|
    squares = sum(float((part @ part.mT).square().sum()) for part in x_NMK.split(ROWS_AT_ONCE))
    return max(0.0, squares / len(x_NMK) - float(moment_MM.square().sum())) / len(x_NMK)


def shrunk(moment_MM: Tensor, error: float) -> Tensor:
    """Return the mixture of a second moment and its mean eigenvalue that is expected to err least.

    Args:
        moment_MM: S.
        error: expected |S - true S|^2.
    """
    target_MM = moment_MM.diagonal().mean() * torch.eye(len(moment_MM)).to(moment_MM)
    spread = float((moment_MM - target_MM).square().sum())
    share = min(1.0, error / spread) if spread > 0 else 1.0
    mixed: Tensor = torch.lerp(moment_MM, target_MM, share)
    return mixed


def balanced_start(group: Group, start: Sequence[Tensor], moments: Sequence[SecondMoment] | None) -> Transform:
    """Return A Q in float64, Q what P starts from.

    Args:
        group: linears, and rows of the token states.
        start: factors of Q, orthogonal in float64.
        moments: of each state, for a dense A; a Kronecker one takes the rows for them.
    """
    weight_OD = torch.cat([weight.double() for weight in group.weights])
    rows = [rows_ND.double() for rows_ND in group.rows_SND]
    energies = [(x @ weight_OD.T).square().sum(1).mean().clamp_min(torch.finfo(torch.float32).tiny) for x in rows]
    total = sum(len(x) for x in rows)
    weighed_ND = torch.cat([x * (total / (len(x) * energy)).sqrt() for x, energy in zip(rows, energies, strict=True)])
    sizes = [len(factor) for factor in start]
    if len(start) == 2:
        maps = list(balanced_factors(weighed_ND.unflatten(1, sizes), weight_OD.unflatten(1, sizes)))
    else:
        assert moments is not None
        error = sampling_error(weighed_ND[..., None], _moment(weighed_ND[..., None]))
        error *= total / sum(m.count for m in moments)  # they are of more tokens than the rows
        parts = [m.mean.to(weight_OD) / energy for m, energy in zip(moments, energies, strict=True)]
        maps = [balanced(shrunk(torch.stack(parts).sum(0), error), weight_OD.T @ weight_OD)]
    factors = [a.to(q) @ q for a, q in zip(maps, start, strict=True)]
    return Transform(factors, [torch.linalg.inv(a).to(q) @ q for a, q in zip(maps, start, strict=True)])
