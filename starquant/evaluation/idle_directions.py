"""Directions of a site that are worth a gate: below the quantization noise for one token state, above it for the other.

A gate closes directions to one state (SGAT). It costs nothing where that state has less energy than rounding adds
anyway, and frees range only if the directions are not idle for the other state too, which any rotation could drop for
both. Seen before anything is learned, on any checkpoint: one pass, one eigendecomposition a site and state.

Shapes: N rows of a state, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from starquant.calibration.site_statistics import SiteStatistics
from starquant.numerics import PerToken, QuantFormat, TokenState, has_hadamard, random_rotation
from starquant.numerics.rounding import grid_of

BITS = 4  # of the noise: the paper's main setting


@dataclass(frozen=True)
class Spectrum:
    """The second moment of a token state, taken apart.

    Attributes:
        values_D: its eigenvalues, ascending.
        vectors_DD: their directions, in columns.
    """

    values_D: Tensor
    vectors_DD: Tensor

    @classmethod
    def of(cls, statistics: SiteStatistics, state: TokenState) -> Spectrum:
        """Return that of a site; raises as `SiteStatistics.second_moment`."""
        return cls(*torch.linalg.eigh(statistics.second_moment(state).mean))

    def share_of_top(self, count: int) -> float:
        """Return the share of the energy in so many directions that hold most of it."""
        return float(self.values_D[-count:].sum() / self.values_D.sum().clamp_min(1e-60))


Spectra = Mapping[TokenState, Spectrum]


def idle_directions(statistics: SiteStatistics, spectra: Spectra) -> dict[str, float]:
    """Return how many directions lie below the noise for "masked" tokens only, "unmasked" only, and "both".

    Subspaces of two states share tr(P_m P_u) directions, P the projections: a number that need not be whole.
    """
    idle = {
        state: spectrum.vectors_DD[:, spectrum.values_D < rounding_noise(statistics.rows(state))]
        for state, spectrum in spectra.items()
    }
    masked_DK, unmasked_DK = idle[TokenState.MASKED], idle[TokenState.UNMASKED]
    both = float((masked_DK.T @ unmasked_DK).square().sum())
    return {"masked": masked_DK.shape[1] - both, "unmasked": unmasked_DK.shape[1] - both, "both": both}


def rounding_noise(rows_ND: Tensor) -> float:
    """Return the mean squared error that a 4-bit grid a token adds to every direction, s^2 / 12, of rotated rows."""
    width = rows_ND.shape[1]
    rotation = random_rotation("hadamard" if has_hadamard(width) else "orthogonal", width, seed=0)
    scale_N1, _ = grid_of(rotation.apply(rows_ND.double()).float(), QuantFormat(BITS, True, PerToken()))
    return float(scale_N1.double().square().mean() / 12)
