"""Statistics of experts that too few tokens reach: of all tokens of their layer, or none (`CalibrationStates`).

Shape suffixes: B batch, L sequence, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from starquant.calibration.batches import StateBatch
from starquant.calibration.site_statistics import Collect, SiteStatistics
from starquant.models.context import Context
from starquant.models.roles import ExpertSite, Site, SiteKey
from starquant.numerics import TokenState

if TYPE_CHECKING:
    from starquant.calibration.walk import BlockVisit


def statistics_of_rare_experts(
    visit: BlockVisit, by_site: Mapping[SiteKey, SiteStatistics], collect: Collect
) -> dict[SiteKey, SiteStatistics]:
    """Return statistics in place of those of experts that too few tokens reach; the visit keeps which these are.

    Args:
        visit: whose block is as it was observed.
        by_site: what was collected.
        collect: what was accumulated.
    """
    states = visit.states
    counts = zip(visit.model.states, states.tokens(visit.model), strict=True)
    least = [0 if state is TokenState.EDITED else min(states.least_tokens, count) for state, count in counts]
    rare = {
        site: statistics.tokens
        for site, statistics in by_site.items()
        if isinstance(site, ExpertSite) and any(n < k for n, k in zip(statistics.tokens, least, strict=True))
    }
    visit.rare |= rare
    instead: dict[SiteKey, SiteStatistics] = {site: visit.statistics(site, collect) for site in rare}
    if instead and states.rare_experts == "pooled":
        _collect_of_all_tokens(visit, instead)
    return instead


def _collect_of_all_tokens(visit: BlockVisit, by_site: Mapping[SiteKey, SiteStatistics]) -> None:
    """Add what experts give for every token of their layer, as though each had been routed to them."""
    experts, inputs = visit.sites.experts, visit.sites.inputs

    def run_experts(h_BLD: Tensor, context: Context, number: int, batch: StateBatch) -> None:
        everyone = context.routed(torch.arange(h_BLD.shape[0] * h_BLD.shape[1], device=h_BLD.device))
        for site, statistics in by_site.items():
            seen = visit.weighted(site, number, batch)
            handle = inputs[site].register_forward_hook(
                lambda _, args, out, s=statistics, b=seen: s.update(out, b, args[1])
            )
            assert isinstance(site, ExpertSite)
            experts[site.expert](h_BLD.flatten(0, 1)[None], everyone)
            handle.remove()

    def hooks(number: int, batch: StateBatch) -> ExitStack:
        stack = ExitStack()
        handle = inputs[Site.GATE_UP].register_forward_hook(
            lambda _, args, out: run_experts(out, args[1], number, batch)
        )
        stack.callback(handle.remove)
        return stack

    visit.observe(hooks)
