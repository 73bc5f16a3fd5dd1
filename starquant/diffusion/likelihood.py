"""Conditional log-likelihood of targets under a mask predictor, many requests at a time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from starquant.diffusion.batch_size import BatchSize, in_batches
from starquant.diffusion.masking import seeded_generator
from starquant.diffusion.noise import MaskPatterns, Noise, mask_patterns
from starquant.diffusion.predictor import MaskPredictor
from starquant.diffusion.prefetch import ahead
from starquant.diffusion.sampling import log_probability
from starquant.errors import ConfigError

#: Masked rows that are made before they are run.
_GROUP = 512


@dataclass(frozen=True)
class ScoreRequest:
    """Score `target` after `prompt`; `suffix` tokens follow the target and stay visible (Dream's EOS).

    `repeat` other than 0 has Monte-Carlo draws of its own.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    suffix: tuple[int, ...] = ()
    repeat: int = 0

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return len(self.prompt) + len(self.target) + len(self.suffix)


def by_blocks(request: ScoreRequest, block_length: int) -> list[ScoreRequest]:
    """Return a request's blocks, each behind the clean text in front of it; blocks count from the prompt's start."""
    start, end = len(request.prompt), len(request.prompt) + len(request.target)
    cuts = [start, *range((start // block_length + 1) * block_length, end, block_length), end]
    whole = request.prompt + request.target
    return [
        replace(request, prompt=whole[:begin], target=whole[begin:stop], suffix=())
        for begin, stop in itertools.pairwise(cuts)
    ]


#: Of rows: what is masked, the prompt's length, the clean text behind.
_Key = tuple[tuple[int, ...], int, tuple[int, ...]]


@dataclass
class _Row:
    """One masked sequence to run, shared by every (request, pattern) that produces exactly these ids."""

    ids: tuple[int, ...]
    prompt_length: int
    clean: tuple[int, ...] = ()  # of block diffusion: the same without masks, behind it in the pass
    wanted: dict[tuple[int, int], int] = field(default_factory=dict)  # (column, token) -> index of its log-prob
    uses: list[tuple[int, float, list[int]]] = field(default_factory=list)  # (request, weight, log-prob indices)


@dataclass(frozen=True)
class LikelihoodEstimator:
    """Estimate log p(target | prompt) by weighted mask patterns.

    Attributes:
        noise: the family's distribution over patterns.
        mc_num: Monte-Carlo draws a request; targets with no more patterns than that are computed exactly.
        cfg_scale: classifier-free guidance.
        batch_size: sequences a forward pass.
        seed: of the draws, combined with each request's tokens.
        most_patterns: so many are summed exactly; None for `mc_num`.
    """

    noise: Noise
    mc_num: int
    cfg_scale: float = 0.0
    batch_size: BatchSize = field(default_factory=BatchSize)
    seed: int = 0
    most_patterns: int | None = None

    def patterns(self, request: ScoreRequest) -> MaskPatterns:
        """Return the request's own mask patterns, the same in any batch and order."""
        kind = "likelihood" if request.repeat == 0 else f"likelihood {request.repeat}"
        generator = seeded_generator(self.seed, kind, request.prompt, request.target)
        return mask_patterns(self.noise, len(request.target), self.mc_num, generator, self.most_patterns)

    def scores(self, predict: MaskPredictor, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, float]]:
        """Yield (index of the request, log-likelihood in nats) as they are finished, about the longest first.

        An empty target scores 0. Where attention is block-causal, a score is the sum of its blocks', each masked behind
        the clean text in front of it, with patterns of its own; one pass over [noisy ; clean] reads a pattern of every
        block.

        Raises:
            ConfigError: guidance of block diffusion, for which none is defined.
        """
        if not requests:  # a finished task scores nothing, without a model
            return
        length = getattr(predict.model, "block_length", None)
        if length is not None and self.cfg_scale:
            raise ConfigError(f"cfg_scale: got {self.cfg_scale:g}, allowed: 0 with block diffusion")
        for group, rows in ahead(self._groups(requests, predict.mask_id, length)):
            yield from self._run(predict, group, rows)

    def score(self, predict: MaskPredictor, requests: Sequence[ScoreRequest]) -> list[float]:
        """Return the log-likelihood of every request, in order."""
        scores = dict(self.scores(predict, requests))
        return [scores[index] for index in range(len(requests))]

    def _groups(
        self, requests: Sequence[ScoreRequest], mask_id: int, block_length: int | None
    ) -> Iterator[tuple[list[int], list[_Row]]]:
        """Yield indices of requests with the rows they need, the longest first."""
        # Requests with one prompt are neighbours, so that the rows their targets share are run once.
        order = sorted(range(len(requests)), key=lambda i: (-requests[i].length, requests[i].prompt, i))
        group: list[int] = []
        rows: dict[_Key, _Row] = {}
        for index in order:
            request = requests[index]
            if request.target and block_length is not None:
                self._add_block_rows(rows, index, by_blocks(request, block_length), mask_id)
            elif request.target:
                self._add_rows(rows, index, request, mask_id)
            group.append(index)
            if len(rows) >= _GROUP:
                yield group, sorted(rows.values(), key=lambda row: -len(row.ids))
                group, rows = [], {}
        yield group, sorted(rows.values(), key=lambda row: -len(row.ids))

    def _add_rows(self, rows: dict[_Key, _Row], index: int, request: ScoreRequest, mask_id: int) -> None:
        patterns = self.patterns(request)
        start = len(request.prompt)
        for masked, weight in zip(patterns.masked_RT.tolist(), patterns.weight_R.tolist(), strict=True):
            noisy = tuple(mask_id if m else t for m, t in zip(masked, request.target, strict=True))
            ids = request.prompt + noisy + request.suffix
            row = rows.setdefault((ids, start, ()), _Row(ids, start))
            wanted = [(start + i, request.target[i]) for i, m in enumerate(masked) if m]
            uses = [row.wanted.setdefault(pair, len(row.wanted)) for pair in wanted]
            row.uses.append((index, weight, uses))

    def _add_block_rows(self, rows: dict[_Key, _Row], index: int, blocks: Sequence[ScoreRequest], mask_id: int) -> None:
        """Add rows that mask one pattern of every block, as long as it has some."""
        drawn = [self.patterns(block) for block in blocks]
        clean, start = blocks[-1].prompt + blocks[-1].target, len(blocks[0].prompt)
        for r in range(max(len(patterns.weight_R) for patterns in drawn)):
            chosen = [(b, p) for b, p in zip(blocks, drawn, strict=True) if r < len(p.weight_R)]
            columns = [[len(b.prompt) + i for i, m in enumerate(p.masked_RT[r].tolist()) if m] for b, p in chosen]
            masked = set(itertools.chain(*columns))
            ids = tuple(mask_id if column in masked else token for column, token in enumerate(clean))
            row = rows.setdefault((ids, start, clean), _Row(ids, start, clean))
            for own, (_, patterns) in zip(columns, chosen, strict=True):
                uses = [row.wanted.setdefault((column, clean[column]), len(row.wanted)) for column in own]
                row.uses.append((index, float(patterns.weight_R[r]), uses))

    def _run(self, predict: MaskPredictor, group: list[int], rows: list[_Row]) -> Iterator[tuple[int, float]]:
        totals = dict.fromkeys(group, 0.0)
        left = Counter(index for row in rows for index, _, _ in row.uses)
        yield from ((index, 0.0) for index in group if index not in left)

        def length(row: _Row) -> int:
            tokens = len(row.ids) + len(row.clean)
            return tokens if self.cfg_scale == 0.0 else 2 * tokens  # guidance doubles the rows

        for batch, scored in in_batches(rows, length, self.batch_size, lambda some: self._log_probs(predict, some)):
            for row, log_probs in zip(batch, scored, strict=True):
                for index, weight, uses in row.uses:
                    totals[index] += weight * sum(log_probs[use] for use in uses)
                    left[index] -= 1
                    if left[index] == 0:
                        yield index, totals[index]

    def _log_probs(self, predict: MaskPredictor, batch: Sequence[_Row]) -> list[list[float]]:
        """Return, for each row, the log-probabilities of its wanted (column, token) pairs."""
        longest = len(batch[0].ids) + len(batch[0].clean)
        position_BL = torch.zeros(len(batch), longest, dtype=torch.long)
        ids_BL = torch.full((len(batch), longest), predict.mask_id)
        visible_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        prompt_BL = torch.zeros_like(visible_BL)
        for b, row in enumerate(batch):
            both = row.ids + row.clean
            ids_BL[b, : len(both)] = torch.tensor(both)
            visible_BL[b, : len(both)] = True
            position_BL[b, : len(both)] = torch.arange(len(both)) % len(row.ids)
            prompt_BL[b, : row.prompt_length] = True
        wanted = [(b, column, token) for b, row in enumerate(batch) for column, token in row.wanted]
        rows_N, columns_N, tokens_N = torch.tensor(wanted).T.to(predict.device)
        settings: dict[str, Any] = {"cfg_scale": self.cfg_scale, "prompt_BL": prompt_BL.to(predict.device)}
        if batch[0].clean:
            settings["position_BL"] = position_BL.to(predict.device)
        settings["visible_BL"] = None if bool(visible_BL.all()) else visible_BL.to(predict.device)
        log_probs = [
            log_probability(logits_NV, tokens_N[part]).double()
            for part, logits_NV in predict.chunks(ids_BL.to(predict.device), (rows_N, columns_N), **settings)
        ]
        numbers = iter(torch.cat(log_probs).tolist())
        return [[next(numbers) for _ in row.wanted] for row in batch]
