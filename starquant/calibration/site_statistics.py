"""Streamed statistics of what the linears of one block read: per site, token state and mask-ratio bin.

Activations are reduced as they pass; none are kept but a bounded sample of rows, where one is asked for.
Shape suffixes: B batch, L sequence, D width of the site, N selected tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from starquant.calibration.batches import StateBatch, bin_of
from starquant.errors import DataError
from starquant.models.context import Context
from starquant.numerics import BIDIRECTIONAL, ChannelMoments, RowSample, SecondMoment, States, TokenState, all_finite

Accumulator = TypeVar("Accumulator", ChannelMoments, SecondMoment)


@dataclass(frozen=True)
class Collect:
    """What to accumulate.

    Attributes:
        moments: per-channel counts, means, variances, absolute maxima.
        second_moment: "pooled" over everything, one a token "state", or one a "bin" of each token state; None for
            none. Each is [D, D] in float64: 1.2 GB at D = 12,288.
        weighted: weight tokens by the states' own weights in second moments (CGQ's Hessian).
        rows: rows sampled uniformly from each token state.
        weighted_rows: multiply them by the states' own weights.
    """

    moments: bool = True
    second_moment: str | None = None
    weighted: bool = False
    rows: int = 0
    weighted_rows: bool = False


#: Edited tokens that are learned from at least, our choice; of fewer a transform would be overfit to them.
LEAST_EDITED = 64

Cell = tuple[TokenState, int]
#: A state, several together, or all.
Which = TokenState | States | None
POOLED: Cell = (TokenState.UNMASKED, 0)  # where second moments of all tokens are kept


class SiteStatistics:
    """Statistics of one site.

    Args:
        where: block and site, named in errors.
        collect: what to accumulate.
        bins: mask-ratio bins.
        seed: of the row sample.
        states: that the model declares.

    Attributes:
        tokens: that have come by, of each token state, on its axis.
    """

    def __init__(self, where: str, collect: Collect, bins: int, seed: int = 0, states: States = BIDIRECTIONAL) -> None:
        self.where, self.collect, self.bins, self.seed, self.states = where, collect, bins, seed, states
        self.tokens = [0] * len(states)
        self._moments: dict[Cell, ChannelMoments] = {}
        self._second: dict[Cell, SecondMoment] = {}
        self._rows: dict[TokenState, RowSample] = {}

    def update(self, x_BLD: Tensor, batch: StateBatch, context: Context) -> None:
        """Add what the site gives in one pass.

        Args:
            x_BLD: of all tokens of the batch, or of those that an expert is given, [1, N, D].
            batch: that is run.
            context: that the site was called with.

        Raises:
            DataError: values that are not finite at a visible token.
        """
        visible_BL = context.of_tokens(batch.visible_BL.to(x_BLD.device))
        if not all_finite(x_BLD[visible_BL]):
            raise DataError(f"{self.where}: activations are not finite (NaN or inf) on the calibration states")
        bin_B1 = bin_of(batch.ratio_B, self.bins)[:, None].to(x_BLD.device)
        bin_BL = context.of_tokens(bin_B1.expand(batch.ids_BL.shape))
        weight_BL = None
        if (self.collect.weighted or self.collect.weighted_rows) and batch.weight_BL is not None:
            weight_BL = context.of_tokens(batch.weight_BL.to(x_BLD.device))
        grain = self.collect.second_moment
        if grain == "pooled":
            self._add_second(POOLED, x_BLD, visible_BL, weight_BL)
        for axis, state in enumerate(self.states):
            here_BL = visible_BL & (context.state_BL == axis)
            if not bool(here_BL.any()):
                continue
            self.tokens[axis] += int(here_BL.sum())
            if grain == "state":
                self._add_second((state, 0), x_BLD, here_BL, weight_BL)
            if self.collect.rows:  # over all bins at once: the sample depends on the order in which rows come
                rows_ND = x_BLD[here_BL]
                if self.collect.weighted_rows and weight_BL is not None:
                    rows_ND = rows_ND * weight_BL[here_BL].to(rows_ND)[:, None]
                self._rows.setdefault(state, RowSample(self.collect.rows, self.seed)).update(rows_ND)
            for k in bin_BL.unique().tolist() if self.collect.moments or grain == "bin" else ():
                chosen_BL = here_BL & (bin_BL == k)
                if self.collect.moments and bool(chosen_BL.any()):
                    self._moments.setdefault((state, k), ChannelMoments()).update(x_BLD[chosen_BL])
                if grain == "bin":
                    self._add_second((state, k), x_BLD, chosen_BL, weight_BL)

    @property
    def empty(self) -> bool:
        """Whether no token has come by."""
        return not (self._moments or self._second or self._rows)

    def learned_states(self) -> States:
        """Return the states that are learned from: all that are declared, whether they came by or not.

        Those that are edited are an exception, for only one sampler has them: fewer than `LEAST_EDITED` are left out.
        """
        counts = zip(self.states, self.tokens, strict=True)
        return tuple(state for state, n in counts if state is not TokenState.EDITED or n >= LEAST_EDITED)

    def _add_second(self, cell: Cell, x_BLD: Tensor, chosen_BL: Tensor, weight_BL: Tensor | None) -> None:
        if bool(chosen_BL.any()):
            weight_N = None if weight_BL is None or not self.collect.weighted else weight_BL[chosen_BL]
            self._second.setdefault(cell, SecondMoment()).update(x_BLD[chosen_BL], weight_N)

    def moments(self, state: TokenState | None = None, k: int | None = None) -> ChannelMoments:
        """Return per-channel moments of a token state (None: all) and mask-ratio bin (None: all).

        Raises:
            DataError: no such token was seen.
            ValueError: moments were not collected.
        """
        if not self.collect.moments:
            raise ValueError(f"{self.where}: moments were not collected")
        return self._merged(self._moments, ChannelMoments, state, k)

    def second_moment(self, state: Which = None, k: int | None = None) -> SecondMoment:
        """Return the second moment of a token state, or of several together, and bin, as `moments`.

        Raises:
            DataError: no such token was seen.
            ValueError: a finer split than was collected.
        """
        grain = self.collect.second_moment
        if grain is None or (state is not None and grain == "pooled") or (k is not None and grain != "bin"):
            raise ValueError(f"{self.where}: second moments collected: {grain}; asked for: state {state}, bin {k}")
        return self._merged(self._second, SecondMoment, state, k)

    def rows(self, state: TokenState | None = None) -> Tensor:
        """Return sampled rows [N, D] of a token state; of all (None), as many of each as there are.

        Raises:
            DataError: no such token was seen.
            ValueError: no rows were sampled.
        """
        if not self.collect.rows:
            raise ValueError(f"{self.where}: no rows were sampled")
        samples = [self._rows[s].rows for s in self.states if s in self._rows and state in (None, s)]
        if not samples:
            raise DataError(self._absent(state, None))
        return torch.cat(samples)

    def _merged(
        self, cells: dict[Cell, Accumulator], make: Callable[[], Accumulator], state: Which, k: int | None
    ) -> Accumulator:
        wanted = state if isinstance(state, tuple) else (state,)
        parts = [part for (s, b), part in cells.items() if (state is None or s in wanted) and k in (None, b)]
        if not parts:
            raise DataError(self._absent(state, k))
        if len(parts) == 1:
            return parts[0]
        total = make()
        for part in parts:
            total.merge(part)
        return total

    def _absent(self, state: Which, k: int | None) -> str:
        names = [s.value for s in (state if isinstance(state, tuple) else (state,)) if s is not None]
        which = f"{' or '.join(names)} " if names else ""
        where = "" if k is None else f" at mask ratios of {k / self.bins:g} to {(k + 1) / self.bins:g}"
        return (
            f"{self.where}: the calibration states have no {which}token{where}; "
            "choose other calibration.states (sampler, min_ratio, max_ratio) or fewer calibration.bins"
        )
