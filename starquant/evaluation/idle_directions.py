"""Directions of a site that are worth a gate: below the quantization noise for one token state, above it for the other.

A gate closes directions to one state (SGAT). It costs nothing where that state has less energy than rounding adds
anyway, and frees range only if the directions are not idle for the other state too, which any rotation could drop for
both. Seen before anything is learned, on any checkpoint: one pass, one eigendecomposition a site and group of states.

Shapes: N rows of a state, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from starquant.calibration.site_statistics import SiteStatistics
from starquant.numerics import PerToken, QuantFormat, States, TokenState, has_hadamard, random_rotation
from starquant.numerics.rounding import grid_of
from starquant.numerics.token_states import of_groups

BITS = 4  # of the noise: the paper's main setting


@dataclass(frozen=True)
class Spectrum:
    """The second moment of a token state or group of states, taken apart.

    Attributes:
        values_D: its eigenvalues, ascending.
        vectors_DD: their directions, in columns.
    """

    values_D: Tensor
    vectors_DD: Tensor

    @classmethod
    def of(cls, statistics: SiteStatistics, state: TokenState | States) -> Spectrum:
        """Return that of a site; raises as `SiteStatistics.second_moment`."""
        return cls(*torch.linalg.eigh(statistics.second_moment(state).mean))

    def share_of_top(self, count: int) -> float:
        """Return the share of the energy in so many directions that hold most of it."""
        return float(self.values_D[-count:].sum() / self.values_D.sum().clamp_min(1e-60))


#: Of the groups "masked" and "unmasked", which stands for all other tokens.
Spectra = Mapping[str, Spectrum]


def groups(states: States) -> dict[str, States]:
    """Return SGAT's two groups of states."""
    return dict(zip(("masked", "unmasked"), of_groups(states), strict=True))


def idle_directions(statistics: SiteStatistics, spectra: Spectra) -> dict[str, float]:
    """Return how many directions lie below the noise for "masked" tokens only, "unmasked" only, and "both".

    Subspaces of two states share tr(P_m P_u) directions, P the projections: a number that need not be whole.
    """
    idle = {}
    for name, states in groups(statistics.learned_states()).items():
        rows_ND, spectrum = torch.cat([statistics.rows(state) for state in states]), spectra[name]
        idle[name] = spectrum.vectors_DD[:, spectrum.values_D < rounding_noise(rows_ND)]
    masked_DK, unmasked_DK = idle["masked"], idle["unmasked"]
    both = float((masked_DK.T @ unmasked_DK).square().sum())
    return {"masked": masked_DK.shape[1] - both, "unmasked": unmasked_DK.shape[1] - both, "both": both}


def rounding_noise(rows_ND: Tensor) -> float:
    """Return the mean squared error that a 4-bit grid a token adds to every direction, s^2 / 12, of rotated rows."""
    width = rows_ND.shape[1]
    rotation = random_rotation("hadamard" if has_hadamard(width) else "orthogonal", width, seed=0)
    scale_N1, _ = grid_of(rotation.apply(rows_ND.double()).float(), QuantFormat(BITS, True, PerToken()))
    return float(scale_N1.double().square().mean() / 12)
