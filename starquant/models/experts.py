"""Mixtures of experts: every token passes a few of many feed-forward layers, which a router chooses.

All experts read rows of one input, `Site.GATE_UP`, transformed and rounded once; what a down-projection reads is its
expert's. The router reads what stands in front of that site, at 16 bits.

Shape suffixes: T tokens (B * L), D model width, K experts a token, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from starquant.models.context import Context
from starquant.models.feed_forward import Expert, dense_linears
from starquant.models.layers import InputSite
from starquant.models.roles import ExpertRole, ExpertSite, LinearKey, Site, SiteKey

#: Linears of a block's attention, and of an expert or a dense layer: what families count.
OF_ATTENTION, OF_EXPERT = 4, 3


class Router(nn.Linear):
    """Scores every expert for every token; a family says which are chosen, with what weights.

    Args:
        width: of the model.
        experts: to choose from.
        top_k: experts a token.
    """

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__(width, experts, bias=False)
        self.top_k = top_k

    def choose(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weights [B, L, K] in float32, chosen experts [B, L, K])."""
        raise NotImplementedError


class Mixture(nn.Module):
    """The feed-forward layer of a block, as a router and experts; some layers that every token passes beside them.

    Args:
        router: under the published name `gate`.
        width: of the model.
        hidden: of an expert.
    """

    def __init__(self, router: Router, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = router
        self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(router.out_features))
        self.gate_up_input = InputSite()

    def shared(self) -> Expert | None:
        """Return the layer that every token passes, unweighted; None for none."""
        return None

    def forward(self, x_BLD: Tensor, context: Context, norm: nn.Module) -> Tensor:
        """Add to the residual stream the weighted sum of what the experts that its norm chooses give.

        With it goes what every token passes.
        """
        n_BLD = norm(x_BLD)
        weight_BLK, chosen_BLK = self.gate.choose(n_BLD)
        h_BLD = self.gate_up_input(n_BLD, context)
        y_BLD = weighted_sum(list(self.experts), h_BLD, weight_BLK.to(x_BLD.dtype), chosen_BLK, context)
        shared = self.shared()
        return x_BLD + (y_BLD if shared is None else y_BLD + shared(h_BLD, context))

    def linears(self) -> dict[LinearKey, nn.Linear]:
        """Return the linears by role and expert; the router is none of them."""
        linears: dict[LinearKey, nn.Linear] = {}
        for index, expert in enumerate(self.experts):
            assert isinstance(expert, Expert)
            linears |= {ExpertRole(role.kind, index): linear for role, linear in dense_linears(expert).items()}
        shared = self.shared()
        return linears if shared is None else linears | dense_linears(shared)

    def inputs(self) -> dict[SiteKey, InputSite]:
        """Return the input sites: one that all experts share, and one of each down-projection."""
        inputs: dict[SiteKey, InputSite] = {Site.GATE_UP: self.gate_up_input}
        for index, expert in enumerate(self.experts):
            assert isinstance(expert, Expert)
            inputs[ExpertSite(Site.DOWN, index)] = expert.down_input
        shared = self.shared()
        return inputs if shared is None else inputs | {Site.DOWN: shared.down_input}


def weighted_sum(
    experts: Sequence[nn.Module], h_BLD: Tensor, weight_BLK: Tensor, chosen_BLK: Tensor, context: Context
) -> Tensor:
    """Return sum_k w_k expert_k(h) of every token, [B, L, D]; each expert runs once, on its tokens.

    Args:
        experts: called with (their tokens [1, N, D], context of these tokens).
        h_BLD: what all of them read, values or integers.
        weight_BLK: of each chosen expert.
        chosen_BLK: indices of experts, distinct for a token.
        context: of the pass.
    """
    length, top_k = chosen_BLK.shape[1:]
    chosen_P = chosen_BLK.flatten()
    counts = torch.bincount(chosen_P, minlength=len(experts)).tolist()
    places_P = chosen_P.argsort(stable=True)  # expert by expert
    tokens_P, weight_P1 = places_P // top_k, weight_BLK.flatten()[places_P, None]
    rows_1P, columns_1P = (tokens_P // length)[None], (tokens_P % length)[None]
    parts = (tokens_P.split(counts), weight_P1.split(counts), rows_1P.split(counts, 1), columns_1P.split(counts, 1))
    y_TD: Tensor | None = None
    for expert, count, tokens_N, weight_N1, *at in zip(experts, counts, *parts, strict=True):
        if count == 0:
            continue
        out_ND = expert(h_BLD[tuple(at)], context.routed(tokens_N))[0]
        if y_TD is None:
            y_TD = out_ND.new_zeros(chosen_BLK.shape[0] * length, out_ND.shape[1])
        y_TD.index_add_(0, tokens_N, out_ND * weight_N1)
    assert y_TD is not None
    y_BLD: Tensor = y_TD.unflatten(0, (-1, length))
    return y_BLD


def routers_of(layer: nn.Module) -> dict[SiteKey, nn.Linear]:
    """Return the router of a feed-forward layer, none of a dense one, as `BlockSites` has it."""
    return {Site.GATE_UP: layer.gate} if isinstance(layer, Mixture) else {}


def experts_of(layer: nn.Module) -> dict[int, nn.Module]:
    """Return the experts of a feed-forward layer, none of a dense one, as `BlockSites` has them."""
    return dict(enumerate(layer.experts)) if isinstance(layer, Mixture) else {}
