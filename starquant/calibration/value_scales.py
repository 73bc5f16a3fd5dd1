"""IA-AQ (arXiv 2508.14090): static scales of V, chosen by the error behind the attention product.

From s0 = max|V| / qmax of each head and channel, alpha s0 for alpha from 1.0 down to 0.8 is tried, and the one kept
that makes ||P^ (Q(V; s) - V)||^2 smallest, P^ being the quantized probabilities. (The paper's s0 is the range over the
number of steps; on a symmetric grid that is max|V| / qmax.)
Shape suffixes: B batch, L sequence, H query heads, K value heads, E head width, A candidate alphas.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from starquant.calibration.batches import StateBatch
from starquant.calibration.walk import BlockVisit
from starquant.errors import DataError
from starquant.models.layers import AttentionCore
from starquant.numerics import fake_quantize
from starquant.quantized.attention import COMMON, KeyValueGrid, operand_format, probabilities, quantize_statically

ALPHAS = tuple(1.0 - 0.02 * step for step in range(11))  # our choice: steps of 0.02

See = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Tensor], None]


class _Witness(AttentionCore):
    """The attention as it was, shown to `see` on its way, with the tokens that are no padding."""

    def __init__(self, core: AttentionCore, see: See, visible_BL: Tensor) -> None:
        super().__init__()
        self.core, self.see, self.visible_BL = core, see, visible_BL

    def forward(self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, mask: Tensor | None) -> Tensor:
        self.see(q_BHLE, k_BKLE, v_BKLE, mask, self.visible_BL.to(q_BHLE.device))
        z_BHLE: Tensor = self.core(q_BHLE, k_BKLE, v_BKLE, mask)
        return z_BHLE


def search_value_scales(visit: BlockVisit, bits: dict[str, int], kv: KeyValueGrid = COMMON) -> Tensor:
    """Return the scale of every head and channel of V, [K, E] in float32.

    Args:
        visit: the block, run twice over the states: for the ranges, then for the errors.
        bits: bits of "q", "k", "p", "v".
        kv: grid of the keys; that of V is symmetric.

    Raises:
        DataError: values that are not finite.
    """
    fmt = operand_format("v", bits["v"])
    absmax: list[Tensor] = []
    _watch(visit, lambda q, k, v, mask, visible: absmax.append(_visible(v, visible).abs().amax((0, 2))))
    absmax_KE = torch.stack(absmax).amax(0).float()
    if not bool(torch.isfinite(absmax_KE).all()):
        raise DataError(f"{visit.name} attention V: values are not finite (NaN or inf) on the calibration states")
    start_KE = absmax_KE.clamp_min(torch.finfo(torch.float32).tiny) / fmt.qmax
    error_AKE = torch.zeros(len(ALPHAS), *start_KE.shape, dtype=torch.float64, device=start_KE.device)

    transform = getattr(visit.sites.attention.core, "qk_transform", None)

    def measure(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, visible_BL: Tensor) -> None:
        if transform is not None:
            q, k = transform(q), transform(k)
        q, k = fake_quantize(q, operand_format("q", bits["q"])), fake_quantize(k, operand_format("k", bits["k"], kv))
        p_BHLL = _visible(fake_quantize(probabilities(q, k, mask), operand_format("p", bits["p"])), visible_BL)
        groups = p_BHLL.shape[1] // v.shape[1]
        p_BKLL = p_BHLL.unflatten(1, (v.shape[1], groups)).flatten(2, 3)  # rows of all query heads that share V
        for a, alpha in enumerate(ALPHAS):
            lost = p_BKLL @ (quantize_statically(v, alpha * start_KE, fmt) - v).float()
            error_AKE[a] += lost.double().square().sum((0, 2))

    _watch(visit, measure)
    alpha_KE = torch.tensor(ALPHAS, device=start_KE.device)[error_AKE.argmin(0)]
    return (alpha_KE * start_KE).float()


def _watch(visit: BlockVisit, see: See) -> None:
    attention = visit.sites.attention

    def hooks(number: int, batch: StateBatch) -> ExitStack:
        stack, core = ExitStack(), attention.core
        attention.core = _Witness(core, see, batch.visible_BL)
        stack.callback(setattr, attention, "core", core)
        return stack

    visit.observe(hooks)


def _visible(x: Tensor, visible_BL: Tensor) -> Tensor:
    """Return [B, heads, L, .] with zeros at padding."""
    return x.masked_fill(~visible_BL[:, None, :, None], 0.0)
