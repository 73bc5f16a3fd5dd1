"""What FlatQuant learns of one block: invertible transforms, channel scales, clip ratios, and the weights they make.

Inputs x become (x * c) P, weights of their linears (W / c) P^-T, with P = A (x) B; value heads become v V, which the
output projection's B undoes; key heads become k K, query heads q K^-T. Weight rows are cut at learned shares of their
largest and smallest number behind P^-T, in front of V.

Shapes: D width of a site, O outputs, I inputs, E head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from starquant.config.bits import BitsSpec
from starquant.config.methods.flatquant import FlatQuantOptions
from starquant.models.roles import BlockSites, ExpertRole, LinearKey, Role, Site, SiteKey
from starquant.numerics import apply_kronecker, cayley, cut_rows, fermat_sizes, random_orthogonal
from starquant.quantized.attention import CLIPPED

Tensors = dict[str, Tensor]
#: Smallest largest activation that channel scales start from, and smallest scale: its authors'.
LEAST = 1e-5


class Pair(NamedTuple):
    """A matrix and its inverse, transposed."""

    matrix: Tensor
    dual: Tensor


class Invertible(nn.Module):
    """P = U diag(s) V^T with orthogonal U and V, Cayley images of skew matrices, and s = 1 at the start.

    U and V are (I - A/2)^-1 (I + A/2), A = L - L^T, L the strictly lower part of a parameter that starts as a random
    orthogonal matrix.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.u_EE, self.v_EE = (nn.Parameter(random_orthogonal(size, generator).float()) for _ in range(2))
        self.s_E = nn.Parameter(torch.ones(size))

    def pair(self, dtype: torch.dtype = torch.float32) -> Pair:
        """Return P and P^-T as they stand, differentiable."""
        u_EE, v_EE = (cayley(free_EE.to(dtype).tril(-1) / 2) for free_EE in (self.u_EE, self.v_EE))
        s_E = self.s_E.to(dtype)
        return Pair((u_EE * s_E) @ v_EE.T, (u_EE / s_E) @ v_EE.T)


class SiteParameters(nn.Module):
    """What is learned of one site.

    Attributes:
        left: A.
        right: B; None at the output projection, whose B is that of the values.
        channel_D: c; None for one.
        clip_E: logits of the clip ratios of its inputs, of the largest and of the smallest number; None for none.
    """

    def __init__(self, sizes: tuple[int, int | None], channel_D: Tensor | None, generator: torch.Generator) -> None:
        super().__init__()
        self.left = Invertible(sizes[0], generator)
        self.right = None if sizes[1] is None else Invertible(sizes[1], generator)
        self.channel_D = None if channel_D is None else nn.Parameter(channel_D.float())
        self.clip_E: nn.Parameter | None = None


class BlockParameters(nn.Module):
    """What is learned of one block, on the block's device.

    `renew` computes matrices from parameters; everything else reads those.

    Args:
        sites: of the block at full precision.
        absmax: largest magnitude of each channel [D] that each site gave.
        bits: only what is rounded is clipped, and only quantized queries or keys are transformed.
        options: of the method.
        seed: of the random start.
    """

    def __init__(
        self, sites: BlockSites, absmax: dict[SiteKey, Tensor], bits: BitsSpec, options: FlatQuantOptions, seed: int
    ) -> None:
        super().__init__()
        attention, device = sites.attention, sites.linears[Role.OUT].weight.device
        self.n_kv_heads, self.start = attention.n_kv_heads, math.log(options.clip_start / (1 - options.clip_start))
        generator = torch.Generator().manual_seed(seed)
        self.sites: dict[SiteKey, SiteParameters] = {}
        for site in sites.inputs:
            channel_D = start_of_channels(sites, site, absmax, options.diagonal_alpha) if options.diagonal else None
            sizes = (attention.n_heads, None) if site is Site.OUT else fermat_sizes(sites.width(site))
            self.sites[site] = SiteParameters(sizes, channel_D, generator)
            if options.clips and bits.activations.bits < 16:
                self.sites[site].clip_E = self._logits(2)
        self.values = Invertible(attention.head_dim, generator)
        rounds_products = min(bits.attention.q, bits.attention.k) < 16
        self.keys = Invertible(attention.head_dim, generator) if rounds_products else None
        clips_operands = options.clips and min(getattr(bits.attention, name) for name in CLIPPED) < 16
        self.operand_clip_OE = self._logits(len(CLIPPED), 2) if clips_operands else None
        self.row_clips: dict[LinearKey, nn.Parameter] = {}
        if options.clips and bits.weights.bits < 16:
            self.row_clips = {role: self._logits(linear.out_features, 2) for role, linear in sites.linears.items()}
        self.parts = nn.ModuleList(self.sites.values())
        self.rows = nn.ParameterList(self.row_clips.values())
        self.to(device)
        self.row_clips = dict(zip(self.row_clips, self.rows, strict=True))
        self.renew()

    def _logits(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, self.start))

    def clips(self) -> list[nn.Parameter]:
        """Return the logits of all clip ratios."""
        operands = () if self.operand_clip_OE is None else (self.operand_clip_OE,)
        return [*self.rows, *operands, *(part.clip_E for part in self.sites.values() if part.clip_E is not None)]

    def renew(self, dtype: torch.dtype = torch.float32) -> None:
        """Compute all matrices from the parameters as they stand."""
        self.now_values = self.values.pair(dtype)
        self.now_keys = None if self.keys is None else self.keys.pair(dtype)
        self.now: dict[SiteKey, tuple[Pair, Pair | None]] = {}
        for site, part in self.sites.items():
            self.now[site] = part.left.pair(dtype), None if part.right is None else part.right.pair(dtype)

    def input(self, site: SiteKey, x: Tensor) -> Tensor:
        """Return (x * c) P."""
        left, right = self.now[site]
        channel_D = self.sites[site].channel_D
        x = x if channel_D is None else x * channel_D
        return apply_kronecker(x, left.matrix, None if right is None else right.matrix)

    def weight(self, role: LinearKey, weight_OI: Tensor) -> Tensor:
        """Return the weight that reads the transformed input, cut, behind V where it makes the values."""
        weight_OI = self.unclipped(role, weight_OI)
        if role in self.row_clips:
            weight_OI = cut_rows(weight_OI, self.row_clips[role].sigmoid())
        if role is not Role.V:
            return weight_OI
        heads_KEI = weight_OI.unflatten(0, (self.n_kv_heads, -1))
        values_OI: Tensor = (self.now_values.matrix.T @ heads_KEI).flatten(0, 1)
        return values_OI

    def unclipped(self, role: LinearKey, weight_OI: Tensor) -> Tensor:
        """Return (W / c) P^-T."""
        left, right = self.now[role.site]
        channel_D = self.sites[role.site].channel_D
        weight_OI = weight_OI if channel_D is None else weight_OI / channel_D
        behind = self.now_values if right is None else right
        return apply_kronecker(weight_OI, left.dual, behind.dual)

    def ends(self, role: LinearKey, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the rows of a weight are cut, [O, 1] each: above, below."""
        ratio_OE = self.row_clips[role].sigmoid()
        high_O1, low_O1 = weight_OI.amax(1, keepdim=True), weight_OI.amin(1, keepdim=True)
        return high_O1 * ratio_OE[:, :1], low_O1 * ratio_OE[:, 1:]

    def bias(self, role: LinearKey, bias_O: Tensor | None) -> Tensor | None:
        """Return the bias, behind V where it is the values'."""
        if bias_O is None or role is not Role.V:
            return bias_O
        values_O: Tensor = (bias_O.unflatten(0, (self.n_kv_heads, -1)) @ self.now_values.matrix).flatten()
        return values_O


def start_of_channels(sites: BlockSites, site: SiteKey, absmax: dict[SiteKey, Tensor], alpha: float) -> Tensor | None:
    """Return c at the start, w_max^(1 - alpha) / x_max^alpha; None where nothing in front of a site can take it.

    An output projection has none. What stands behind a norm that a router of experts reads too has none either.
    """
    readers = sites.readers(site)
    behind_norm = site in sites.norms and not any(isinstance(role, ExpertRole) for role in readers)
    if not behind_norm and site.kind is not Site.DOWN:
        return None
    largest_D = torch.stack([linear.weight.float().abs().amax(0) for linear in readers.values()]).amax(0)
    absmax_D = absmax[site].to(largest_D).clamp_min(LEAST) if site in absmax else torch.ones_like(largest_D)
    return (largest_D ** (1 - alpha) / absmax_D**alpha).clamp_min(LEAST)
