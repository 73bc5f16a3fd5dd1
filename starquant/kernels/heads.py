"""What queries and keys pass before they meet, in one pass on a GPU: a norm per head, the rotary embedding.

Shape suffixes: M tokens, H heads, K heads of keys, E head width, R channels that are turned, P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.kernels.dispatch import launched_on
from starquant.kernels.tokens import Norm

Norms = tuple[Norm, Norm] | None


def turn_heads(
    q_MD: Tensor, k_MD: Tensor, head_dim: int, cos_PR: Tensor, sin_PR: Tensor, norms: Norms = None
) -> tuple[Tensor, Tensor]:
    """Return queries [M, H, E] and keys [M, K, E], normalised per head and turned; by Triton only.

    Args:
        q_MD: 16 bits, [M, H * E]; rows may be those of a wider tensor.
        k_MD: [M, K * E], as the queries.
        head_dim: E.
        cos_PR: float32, of the tokens' positions; token m has row m modulo P.
        sin_PR: likewise.
        norms: of queries and of keys, their gains of E channels in the heads' dtype, of one eps; None for none.
    """
    of_q, of_k = (None, None) if norms is None else norms
    run = _turn_op if torch.compiler.is_compiling() else _turn
    gains = None if of_q is None else of_q.gain_K, None if of_k is None else of_k.gain_K
    q_MHE, k_MKE = run(q_MD, k_MD, head_dim, cos_PR, sin_PR, *gains, 0.0 if of_q is None else of_q.eps)
    return q_MHE, k_MKE


def _turn(
    q_MD: Tensor,
    k_MD: Tensor,
    head_dim: int,
    cos_PR: Tensor,
    sin_PR: Tensor,
    q_gain_E: Tensor | None,
    k_gain_E: Tensor | None,
    eps: float,
) -> list[Tensor]:
    from starquant.kernels.triton.heads import turn

    with launched_on(q_MD):
        return [*turn(q_MD, k_MD, head_dim, cos_PR, sin_PR, q_gain_E, k_gain_E, eps)]


_turn_op = torch.library.custom_op("starquant::turn_heads", _turn, mutates_args=())


@_turn_op.register_fake
def _(q_MD: Tensor, k_MD: Tensor, head_dim: int, *_: object) -> list[Tensor]:
    return [x.new_empty(x.shape[0], x.shape[1] // head_dim, head_dim) for x in (q_MD, k_MD)]
