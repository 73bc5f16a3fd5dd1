"""SGAT, State-Guided Activation Transformation (STaR-Quant, arXiv 2606.04945): two activation spaces, one weight.

Transformed channels are [shared | d_m | d_u], d = d_sh + d_m + d_u (`numerics.gate_channels`). Masked tokens have the
last d_u at zero, all others the d_m in front of them; the weight side is one static matrix. Directions in which a state
has (almost) no energy cost it nothing, and free a little of its range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starquant.config.methods.star_quant import SGATOptions
from starquant.models.roles import Site, SiteKey


@dataclass(frozen=True)
class Gate:
    """Channels of one state only at one site, and why these."""

    d_m: int
    d_u: int
    why: str

    @property
    def widths(self) -> tuple[int, int]:
        """Return (d_m, d_u)."""
        return self.d_m, self.d_u

    @property
    def acts(self) -> bool:
        """Whether anything is gated."""
        return self.d_m + self.d_u > 0

    def in_runs(self, length: int) -> Gate:
        """Return the nearest gate of whole runs of `length` channels."""
        d_m, d_u = (round(width / length) * length for width in self.widths)
        if (d_m, d_u) == self.widths:
            return self
        return Gate(d_m, d_u, f"{self.why}: {self.d_m} and {self.d_u}, in whole runs of {length}")


def gate_of(options: SGATOptions, site: SiteKey, block: int, width: int) -> Gate:
    """Return the gate that the options put at a site."""
    if not options.enabled:
        return Gate(0, 0, "off")
    if site is Site.QKV and block == 0 and not options.first_attention:
        return Gate(0, 0, "first attention input: all masked tokens share one vector")
    d_m, d_u = (round(getattr(shares, site.kind.value) * width) for shares in (options.masked, options.unmasked))
    return Gate(d_m, d_u, "asked")


def closed_form(masked_DD: Tensor, unmasked_DD: Tensor, gate: tuple[int, int]) -> Tensor:
    """Return P = [U_sh, U_m, U_u], orthogonal [D, D] in float64, from second moments of both token states.

    U_u, which masked tokens do without, spans the d_u directions of least energy of masked tokens; U_m the d_m of least
    energy of the others in what is left; U_sh is the basis of the rest that is nearest the coordinate axes, so that a
    rotation that has levelled them stays level. (The paper does not say; the order had the smallest local error.)

    Args:
        masked_DD: E[x x^T] of masked tokens.
        unmasked_DD: of the others.
        gate: (d_m, d_u).
    """
    d_m, d_u = gate
    masked_DD, unmasked_DD = masked_DD.double(), unmasked_DD.double()
    width = len(masked_DD)
    _, vectors = torch.linalg.eigh(masked_DD)  # ascending
    u_DU, rest_DR = vectors[:, :d_u], vectors[:, d_u:]
    _, inner = torch.linalg.eigh(rest_DR.T @ unmasked_DD @ rest_DR)
    m_DM, rest_DS = rest_DR @ inner[:, :d_m], rest_DR @ inner[:, d_m:]
    left, _, right = torch.linalg.svd(rest_DS.T @ torch.eye(width, dtype=torch.float64)[:, : width - d_m - d_u])
    return torch.cat((rest_DS @ (left @ right), m_DM, u_DU), 1)


def closed_form_of_rows(masked_NMK: Tensor, unmasked_NMK: Tensor, gate: tuple[int, int]) -> Tensor:
    """Return the first factor [M, M] of P = A (x) B in closed form, in float64; B may be any orthogonal [K, K].

    Channel (m, k) of x P has sum_ij x_ij A_im B_jk. A gate of whole runs of K channels closes columns of A, and what
    a state has there is a^T E[X X^T] a, X the [M, K] of its token: `closed_form` of these moments is the least.

    Args:
        masked_NMK: masked tokens.
        unmasked_NMK: the others.
        gate: (d_m, d_u), multiples of K.
    """
    moments = [torch.einsum("nmk,njk->mj", x.double(), x.double()) / len(x) for x in (masked_NMK, unmasked_NMK)]
    runs = (gate[0] // masked_NMK.shape[2], gate[1] // masked_NMK.shape[2])
    return closed_form(moments[0].cpu(), moments[1].cpu(), runs)
