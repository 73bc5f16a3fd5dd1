"""A closed-form invertible map in front of P, that balances what rounding costs on both sides of a product.

Rounding x A Q and W A^-T Q costs about tr(A^T S A) tr(A^-1 H A^-T), whatever the orthogonal Q spreads evenly: S is the
second moment of x, each token state's divided by the energy of its outputs, H = W^T W. The least is at
A A^T = S^-1/2 (S^1/2 H S^1/2)^1/2 S^-1/2, the geometric mean of S^-1 and H; A is its symmetric root. Of a Kronecker
product A_1 (x) A_2 each factor has the same closed form while the other stands, in turn.

Shapes: N rows, D = M K width of the site, O outputs of all linears that read it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from starquant.methods.star_quant.base_transform import Group, Transform
from starquant.numerics import symmetric_power

DAMPING = 1e-3  # of both second moments, as a share of their mean eigenvalue; our choice
ROUNDS = 4  # over both factors; our choice


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
        rows_NMK: x, scaled so that S = X^T X.
        weight_OMK: W.
    """
    left_MM, right_KK = (torch.eye(n, dtype=torch.float64).to(rows_NMK.device) for n in rows_NMK.shape[1:])
    for _ in range(ROUNDS):
        dual_KK = torch.linalg.inv(right_KK)
        left_MM = balanced(_moment(rows_NMK @ right_KK), _moment(weight_OMK @ dual_KK))
        dual_MM = torch.linalg.inv(left_MM)
        right_KK = balanced(_moment((left_MM @ rows_NMK).mT), _moment((dual_MM @ weight_OMK).mT))
    return left_MM, right_KK


def _moment(x_NMK: Tensor) -> Tensor:
    """Return sum over N of X X^T, [M, M]."""
    flat_MX = x_NMK.transpose(0, 1).flatten(1)
    return flat_MX @ flat_MX.T


def balanced_start(group: Group, start: Sequence[Tensor], moments: Sequence[Tensor] | None) -> Transform:
    """Return A Q in float64, Q what P starts from.

    Args:
        group: linears, and rows of both token states.
        start: factors of Q, orthogonal in float64.
        moments: E[x x^T] of each state, for a dense A; None takes the rows for them.
    """
    weight_OD = torch.cat([weight.double() for weight in group.weights])
    rows = [rows_ND.double() for rows_ND in group.rows_SND]
    energies = [(x @ weight_OD.T).square().sum(1).mean().clamp_min(torch.finfo(torch.float32).tiny) for x in rows]
    if len(start) == 1:
        second = [x.T @ x / len(x) for x in rows] if moments is None else [m.to(weight_OD) for m in moments]
        total_DD = torch.stack([m / energy for m, energy in zip(second, energies, strict=True)]).sum(0)
        maps = [balanced(total_DD, weight_OD.T @ weight_OD)]
    else:
        sizes = [len(factor) for factor in start]
        scaled = [x / (energy * len(x)).sqrt() for x, energy in zip(rows, energies, strict=True)]
        maps = list(balanced_factors(torch.cat(scaled).unflatten(1, sizes), weight_OD.unflatten(1, sizes)))
    factors = [a.to(q) @ q for a, q in zip(maps, start, strict=True)]
    return Transform(factors, [torch.linalg.inv(a).to(q) @ q for a, q in zip(maps, start, strict=True)])
