"""Walk a model block by block over all calibration states, one block resident at a time.

What is kept between blocks is the hidden states in front of the next one (`held_states`). A visitor gets a copy of
each block to rewrite, observe and quantize; the model itself is never changed.
Shape suffixes: B batch, L sequence, D model width.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from starquant.calibration.batches import CalibrationStates, StateBatch
from starquant.calibration.expert_statistics import statistics_of_rare_experts
from starquant.calibration.held_states import HeldStates
from starquant.calibration.partial_pass import run_as_far_as
from starquant.calibration.site_statistics import Collect, SiteStatistics
from starquant.errors import DataError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.blocks_on_disk import resident_block
from starquant.models.context import Context
from starquant.models.layers import site_input
from starquant.models.roles import BlockSites, ExpertSite, LinearInfo, Site, SiteKey
from starquant.session.progress import SILENT, Progress

Embed = Callable[..., Tensor]  # of embedded tokens [B, L, D]; `rounded` takes their ids as well


@dataclass
class _Item:
    """One batch on its way through the model."""

    batch: StateBatch
    context: Context
    hidden_BLD: Tensor
    exact_BLD: Tensor | None = None


@dataclass(frozen=True)
class Pair:
    """What batch `number` gives at a site of the exact and of the quantized block, [B, L, D] each."""

    number: int
    context: Context
    visible_BL: Tensor
    exact_BLD: Tensor
    quantized_BLD: Tensor


@dataclass(frozen=True)
class Example:
    """Some sequences as a block reads and gives them, [B, L, D] each."""

    context: Context
    visible_BL: Tensor
    hidden_BLD: Tensor
    output_BLD: Tensor


class BlockVisit:
    """One block during a walk.

    Attributes:
        index: of the block.
        block: a copy of it, free to be changed in place; gone once the walk goes on.
        feeds_quantized: whether the next block is fed what `block` computes once the visitor is done with it;
            otherwise what it computed when it was first observed.
        token_weights: weights [B, L] of each batch in a site's statistics, where these are weighted; of other sites the
            batches' own.
        progress: bars of what is learned of the block.
        rare: experts' sites that calibration rarely reaches, and how many tokens of each state did.
        exact: the block as `keep_exact` found it, which is fed what the exact blocks before it gave; None before.
    """

    def __init__(
        self,
        model: MaskedDiffusionModel,
        index: int,
        items: list[_Item],
        states: CalibrationStates,
        held: HeldStates,
        progress: Progress = SILENT,
    ) -> None:
        self.model, self.index, self.states, self.progress = model, index, states, progress
        self.block = resident_block(model, index)
        self.feeds_quantized = states.inputs != "full_precision"
        self._items, self._held = items, held
        self._outputs: list[Tensor] | None = None
        self.exact: nn.Module | None = None
        self.token_weights: Mapping[SiteKey, Sequence[Tensor]] = {}
        self.rare: dict[ExpertSite, list[int]] = {}

    def keep_exact(self) -> None:
        """Keep a copy of the block as it stands, to be compared with later (`side_by_side`).

        A visitor that wants it must say so at every block.
        """
        self.exact = copy.deepcopy(self.block)

    def side_by_side(
        self, other: nn.Module, site: SiteKey, receive: Callable[[Pair], None], transformed: bool = False
    ) -> None:
        """Run the exact block on exact hidden states beside `other` on those that this walk feeds.

        Args:
            other: the block or a copy of it, quantized as far as the site.
            site: whose input is looked at.
            receive: called with each batch.
            transformed: look behind the site's transform, not in front of it.
        """
        assert self.exact is not None, "keep_exact comes first"
        sides = (self.exact, other)
        caught: dict[int, Tensor] = {}
        handles = [
            self.model.block_sites(block)
            .inputs[site]
            .register_forward_hook(
                lambda _, inputs, out, side=side: caught.__setitem__(side, out if transformed else site_input(inputs))
            )
            for side, block in enumerate(sides)
        ]
        try:
            for number, item in enumerate(self._items):
                exact_BLD = item.hidden_BLD if item.exact_BLD is None else item.exact_BLD
                for block, hidden_BLD in zip(sides, (exact_BLD, item.hidden_BLD), strict=True):
                    run_as_far_as(self.model.block_sites(block).inputs[site], block, hidden_BLD, item.context)
                visible_BL = item.batch.visible_BL.to(caught[0].device)
                receive(Pair(number, item.context, visible_BL, caught[0], caught[1]))
        finally:
            for handle in handles:
                handle.remove()

    @property
    def sites(self) -> BlockSites:
        """The block's linears by role, its sites, attention and norms, as they stand now."""
        return self.model.block_sites(self.block)

    @property
    def exact_sites(self) -> BlockSites:
        """Those of the exact block."""
        assert self.exact is not None, "keep_exact comes first"
        return self.model.block_sites(self.exact)

    @property
    def linears(self) -> dict[str, LinearInfo]:
        """The block's linears by qualified name, as they stand now."""
        return self.model.block_linears(self.block, self.index)

    @property
    def name(self) -> str:
        """Qualified name of the block."""
        return self.model.block_name(self.index)

    def observe(
        self, hooks: Callable[[int, StateBatch], ExitStack] | None = None, last: nn.Module | None = None
    ) -> None:
        """Run the block over all states.

        Args:
            hooks: called before each batch with its number and it; the hooks it has registered are removed after the
                batch.
            last: the module behind which nothing is looked at any more; None for the block itself.
        """
        outputs, wanted = [], not self.feeds_quantized and self._outputs is None
        for number, item in enumerate(self._items):
            with hooks(number, item.batch) if hooks is not None else ExitStack():
                if wanted or last is None:
                    out = self.block(item.hidden_BLD, item.context)
                else:
                    run_as_far_as(last, self.block, item.hidden_BLD, item.context)
            if wanted:
                outputs.append(self._hold("hidden", number, out))
        if outputs:
            self._outputs = outputs

    def collect(self, collect: Collect, sites: Iterable[SiteKey] | None = None) -> dict[SiteKey, SiteStatistics]:
        """Run the block over all states and return statistics of what its sites (None: all) give to their linears.

        Those of an expert that few tokens reach are of all tokens of its layer, or empty (`CalibrationStates`).

        Raises:
            DataError: activations that are not finite; no states.
        """
        modules = self.sites.inputs
        by_site = {site: self.statistics(site, collect) for site in (modules if sites is None else sites)}

        def hooks(number: int, batch: StateBatch) -> ExitStack:
            stack = ExitStack()
            for site, statistics in by_site.items():
                seen = self.weighted(site, number, batch)
                handle = modules[site].register_forward_hook(
                    lambda _, inputs, out, s=statistics, b=seen: s.update(out, b, inputs[1])
                )
                stack.callback(handle.remove)
            return stack

        dense = [site for site in modules if site in by_site and isinstance(site, Site)]
        self.observe(hooks, modules[dense[-1]] if len(dense) == len(by_site) > 0 else None)
        return by_site | statistics_of_rare_experts(self, by_site, collect)

    def statistics(self, site: SiteKey, collect: Collect) -> SiteStatistics:
        """Return statistics of a site that nothing has been added to."""
        where, declared = f"{self.name} {site.value}", self.model.states
        return SiteStatistics(where, collect, self.states.bins, seed=self.index, states=declared)

    def weighted(self, site: SiteKey, number: int, batch: StateBatch) -> StateBatch:
        """Return a batch with the weights that its tokens have at a site."""
        weights = self.token_weights.get(site)
        return batch if weights is None else dataclasses.replace(batch, weight_BL=weights[number])

    def count_examples(self, most: int) -> int:
        """Return how many `examples` there are."""
        return sum(-(-len(item.batch.ids_BL) // most) for item in self._items)

    def examples(self, most: int) -> Iterator[Example]:
        """Yield all states, at most so many sequences at a time, with what the block gives for them.

        Where the walk feeds full precision, that is what it gave when it was first observed (`observe` comes first);
        elsewhere what it gives as it stands.
        """
        for number, item in enumerate(self._items):
            for begin in range(0, len(item.batch.ids_BL), most):
                rows = slice(begin, begin + most)
                part, hidden_BLD = item.batch.of_rows(rows), item.hidden_BLD[rows]
                context, visible_BL = part.context(self.model), part.visible_BL.to(self.model.device)
                if self._outputs is not None:
                    output_BLD = self._outputs[number][rows]
                else:
                    with torch.no_grad():
                        output_BLD = self.block(hidden_BLD, context)
                yield Example(context, visible_BL, hidden_BLD, output_BLD)

    def advance(self) -> None:
        """Put what this block gives in front of the next one."""
        if self.feeds_quantized and self.exact is not None:
            for number, item in enumerate(self._items):
                exact_BLD = item.hidden_BLD if item.exact_BLD is None else item.exact_BLD
                item.exact_BLD = self._hold("exact", number, self.exact(exact_BLD, item.context))
        if self._outputs is not None:
            for item, out in zip(self._items, self._outputs, strict=True):
                item.hidden_BLD = out
            return
        for number, item in enumerate(self._items):
            item.hidden_BLD = self._hold("hidden", number, self.block(item.hidden_BLD, item.context))

    def _hold(self, what: str, number: int, states_BLD: Tensor) -> Tensor:
        """Hold what goes to the next block, beside what this one reads: blocks take turns at two places."""
        return self._held.hold(f"{what}-{number}-{self.index % 2}", states_BLD)


@torch.no_grad()
def walk(
    model: MaskedDiffusionModel,
    states: CalibrationStates,
    embed: Embed | None = None,
    progress: Progress = SILENT,
    rounded: Embed | None = None,
) -> Iterator[BlockVisit]:
    """Visit the blocks in order.

    Args:
        model: at full precision, in memory or with its blocks on disk.
        states: what the model is run on.
        embed: maps the embedding [B, L, D] to the basis that the visitor rewrites blocks to.
        progress: draws a bar over the blocks, and those of visitors.
        rounded: maps that, and its ids, to what a quantized embedding gives, where blocks are fed it.

    Raises:
        DataError: no states.
    """
    if not states.batches:
        raise DataError("calibration: got no states, allowed: at least one segment (calibration.source.segments)")
    held = HeldStates.beside(model)
    try:
        items = [_start(model, batch, embed, rounded) for batch in states.batches]
        for number, item in enumerate(items):
            item.hidden_BLD = held.hold(f"hidden-{number}-1", item.hidden_BLD)
            if item.exact_BLD is not None:
                item.exact_BLD = held.hold(f"exact-{number}-1", item.exact_BLD)
        for index in progress.bar(range(len(model.trunk().blocks)), "calibrate", "block"):
            visit = BlockVisit(model, index, items, states, held, progress)
            yield visit
            visit.advance()
            visit.exact = None
            del visit.block  # the caller still holds the visit while the next block is copied
    finally:
        held.drop()


def _start(model: MaskedDiffusionModel, batch: StateBatch, embed: Embed | None, rounded: Embed | None) -> _Item:
    hidden_BLD = nn.functional.embedding(batch.ids_BL.to(model.device), model.trunk().embedding.weight)
    hidden_BLD = hidden_BLD if embed is None else embed(hidden_BLD)
    both = (hidden_BLD,) if rounded is None else (rounded(hidden_BLD, batch.ids_BL), hidden_BLD)
    return _Item(batch, batch.context(model), *both)
