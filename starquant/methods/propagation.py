"""What roundings have done to the inputs of linears, which their weights may make up for (QEP, arXiv 2504.09629).

x is what a site gives to its linears at full precision; q what it gives behind everything that was quantized in front
of it, and behind its own rounding. Shapes: B batch, L sequence, D width of the site.
"""

from __future__ import annotations

from torch import Tensor

from starquant.calibration.walk import BlockVisit, Pair
from starquant.models.roles import Site
from starquant.numerics import QuantFormat
from starquant.numerics.moments import SecondMoment
from starquant.quantized import ActivationQuantizer


def moments_of_moved_inputs(
    visit: BlockVisit, site: Site, grid: QuantFormat, weighted: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the sums of q q^T and of (x - q) q^T over all states, [D, D] each.

    Args:
        visit: the exact block kept, and rewritten as the block itself, which is quantized as far as the site.
        site: with gate, clip ratios and correction in place; not quantized yet.
        grid: of the site's own rounding.
        weighted: use the tokens' weights at the site.

    Raises:
        DataError: activations that are not finite.
    """
    rounding = ActivationQuantizer(grid, None, visit.sites.inputs[site].state_clip)
    second, moved = SecondMoment(), SecondMoment()

    def add(pair: Pair) -> None:
        batch, shown_BL = visit.weighted(site, pair.number, visit.states.batches[pair.number]), pair.visible_BL
        rounded_BLD = rounding(pair.quantized_BLD, pair.context)
        assert isinstance(rounded_BLD, Tensor)
        q_ND, x_ND = rounded_BLD[shown_BL], pair.exact_BLD[shown_BL]
        weight_N = batch.weight_BL.to(q_ND.device)[shown_BL] if weighted and batch.weight_BL is not None else None
        second.update(q_ND, weight_N)
        moved.update(q_ND.float(), weight_N, x_ND.float() - q_ND.float())

    visit.side_by_side(visit.block, site, add, transformed=True)
    return second.total, moved.total
