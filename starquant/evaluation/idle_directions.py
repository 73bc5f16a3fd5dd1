"""Directions of a site that are worth a gate: below the quantization noise for one token state, above it for the other.

A gate closes directions to one state (SGAT). It costs nothing where that state has less energy than rounding adds
anyway, and frees range only if the directions are not idle for the other state too, which any rotation could drop for
both. Seen before anything is learned, on any checkpoint: one pass, one eigendecomposition a site and state.

Shapes: N rows of a state, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.calibration.site_statistics import SiteStatistics
from starquant.numerics import PerToken, QuantFormat, TokenState, has_hadamard, random_rotation
from starquant.numerics.rounding import grid_of

BITS = 4  # of the noise: the paper's main setting


def idle_directions(statistics: SiteStatistics) -> dict[str, float] | None:
    """Return how many directions lie below the noise for "masked" tokens only, "unmasked" only, and "both".

    Subspaces of two states share tr(P_m P_u) directions, P the projections: a number that need not be whole. None for
    sites that are too wide for second moments.
    """
    if statistics.collect.second_moment is None:
        return None
    idle = {state: _idle_basis(statistics, state) for state in TokenState}
    masked_DK, unmasked_DK = idle[TokenState.MASKED], idle[TokenState.UNMASKED]
    both = float((masked_DK.T @ unmasked_DK).square().sum())
    return {"masked": masked_DK.shape[1] - both, "unmasked": unmasked_DK.shape[1] - both, "both": both}


def _idle_basis(statistics: SiteStatistics, state: TokenState) -> Tensor:
    """Return the eigenvectors [D, K] of a state's second moment whose energy is below the noise."""
    values_D, vectors_DD = torch.linalg.eigh(statistics.second_moment(state).mean.double())
    idle_DK: Tensor = vectors_DD[:, values_D < rounding_noise(statistics.rows(state))]
    return idle_DK


def rounding_noise(rows_ND: Tensor) -> float:
    """Return the mean squared error that a 4-bit grid a token adds to every direction, s^2 / 12, of rotated rows."""
    width = rows_ND.shape[1]
    rotation = random_rotation("hadamard" if has_hadamard(width) else "orthogonal", width, seed=0)
    scale_N1, _ = grid_of(rotation.apply(rows_ND.double()).float(), QuantFormat(BITS, True, PerToken()))
    return float(scale_N1.double().square().mean() / 12)
