"""TAC, Temporal Attention Compensation (STaR-Quant, arXiv 2606.04945): an affine map of the quantized attention output.

In front of the output projection every block b of g channels becomes z_b M_b^T + d_b, with M_b and d_b in closed form
from moments of exact and quantized attention outputs over denoising states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from starquant.calibration.walk import BlockVisit, Pair
from starquant.config.bits import AttentionSpec
from starquant.config.methods.star_quant import TACOptions
from starquant.errors import ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Site
from starquant.numerics import PairMoments, States, TokenState, moment_matching, ridge_least_squares
from starquant.quantized.state_transforms import bin_of_context

MATRIX, SHIFT = "tac.matrix", "tac.shift"


def validate_tac(model: MaskedDiffusionModel, options: TACOptions, operands: AttentionSpec) -> None:
    """Judge block size and placement.

    Raises:
        ConfigError: a block size that does not divide, a placement that would not be exact.
    """
    attention = model.block_sites(model.trunk().blocks[0]).attention
    width, g = attention.n_heads * attention.head_dim, options.block_size
    if width % g:
        raise ConfigError(f"method.tac.block_size: got {g}, which does not divide the {width} attention channels")
    if options.placement == "value":
        if attention.head_dim % g:
            raise ConfigError(
                f"method.tac.block_size: got {g}, which does not divide the head width {attention.head_dim}; "
                "placement=value needs that"
            )
        if options.condition != "all":
            raise ConfigError(
                f"method.tac.condition: got '{options.condition}', but placement=value maps the values that all "
                "tokens attend to; allowed: all"
            )
        low = [name for name in ("p", "v") if getattr(operands, name) < 16]
        if low:
            raise ConfigError(
                f"bits.attention.{low[0]}: got {getattr(operands, low[0])}, but method.tac.placement=value is exact "
                "only where softmax.V is at 16 bits; allowed: 16, or method.tac.placement=output"
            )


def fit_tac(visit: BlockVisit, quantized: nn.Module, options: TACOptions) -> dict[str, Tensor]:
    """Return maps M [C, N, g, g] and d [C, N, g] from the block's exact and quantized attention outputs.

    Args:
        visit: with the exact block kept.
        quantized: a copy of the block, quantized up to the attention output.
        options: of TAC.

    Raises:
        DataError: a condition that (almost) no calibration token meets.
    """
    bins = visit.states.bins if options.condition == "bin" else 1
    cells = _Cells(options, bins, visit.model.states)
    visit.side_by_side(quantized, Site.OUT, cells.add)
    attention = visit.sites.attention
    maps = []
    for moments in cells.filled():
        if options.placement == "value":
            moments = moments.pooled(attention.n_heads // attention.n_kv_heads, attention.head_dim)
        maps.append(_solve(moments, options))
    matrices, shifts = zip(*maps, strict=True)
    return {MATRIX: torch.stack(matrices).float(), SHIFT: torch.stack(shifts).float()}


class _Cells:
    """Moments by condition: all tokens, by state, or by bin and state (bin k, state s of S at S k + s)."""

    def __init__(self, options: TACOptions, bins: int, states: States) -> None:
        count = 1 if options.condition == "all" else len(states) * bins
        self.bins, self.states = bins, states
        self.parts = [PairMoments(options.block_size) for _ in range(count)]

    def add(self, pair: Pair) -> None:
        if len(self.parts) == 1:
            self.parts[0].update(pair.exact_BLD[pair.visible_BL], pair.quantized_BLD[pair.visible_BL])
            return
        bin_B = bin_of_context(pair.context, self.bins)
        for index, moments in enumerate(self.parts):
            bin_k, state = divmod(index, len(self.states))
            here_BL = pair.visible_BL & (pair.context.state_BL == state) & (bin_B == bin_k)[:, None]
            if bool(here_BL.any()):
                moments.update(pair.exact_BLD[here_BL], pair.quantized_BLD[here_BL])

    def filled(self) -> list[PairMoments]:
        """Return the moments; a bin with too few tokens takes those of its state in all bins.

        Tokens that are edited, which only one sampler has, take those of the state in front of theirs: committed ones.
        """
        block, count = self.parts[0].block_size, len(self.states)
        parts: list[PairMoments] = []
        for index, moments in enumerate(self.parts):
            if len(self.parts) > count and moments.count < 4 * block:
                pooled = PairMoments(block)
                for other in self.parts[index % count :: count]:
                    pooled.merge(other)
                moments = pooled
            if self.states[index % count] is TokenState.EDITED and moments.count < 4 * block:
                moments = parts[-1]
            parts.append(moments)
        return parts


def _solve(moments: PairMoments, options: TACOptions) -> tuple[Tensor, Tensor]:
    if options.solver == "moment_matching":
        return moment_matching(moments, options.damping, options.smoothing, options.shrinkage)
    return ridge_least_squares(moments, options.damping, options.shrinkage)
