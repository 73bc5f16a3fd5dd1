"""A stand-in for a model that counts what goes through it: true vocabulary, no blocks, eight channels.

What evaluates a model evaluates the stand-in as well, so that passes and tokens are those of the run itself, with its
batches, caches and savings; its seconds are what is done beside the model.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.models.base import MaskedDiffusionModel

#: Channels of the stand-in.
WIDTH = 8
#: Items that are gone through, one size after the other, as long as the last took less seconds: reading what all
#: items share may be most of the first.
SIZES = (1, 8, 64, 512)
PATIENCE = (3.0, 1.0, 1.0, 0.0)

Shape = tuple[int, int]
#: Goes through so many items of a task; returns how many it was, and how many there are.
Answer = Callable[[int], tuple[int, int]]


class _Table(nn.Embedding):
    """An embedding that every id has a row in."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids, counted anew behind the last."""
        return F.embedding(ids % len(self.weight), self.weight)


@dataclass(frozen=True)
class Passes:
    """What goes through a model.

    Attributes:
        shapes: how many passes of so many (rows, columns) of tokens.
        logit_rows: positions whose logits are computed.
        seconds: beside the model.
    """

    shapes: Counter[Shape] = field(default_factory=Counter)
    logit_rows: float = 0.0
    seconds: float = 0.0

    @property
    def number(self) -> float:
        """How many passes."""
        return float(sum(self.shapes.values()))

    @property
    def tokens(self) -> float:
        """Tokens of all passes."""
        return float(sum(times * rows * columns for (rows, columns), times in self.shapes.items()))

    def __add__(self, other: Passes) -> Passes:
        """Return both."""
        shapes = Counter(self.shapes)
        shapes.update(other.shapes)
        return Passes(shapes, self.logit_rows + other.logit_rows, self.seconds + other.seconds)

    def times(self, factor: float) -> Passes:
        """Return so many times as much."""
        shapes: Counter[Shape] = Counter()
        for shape, number in self.shapes.items():
            shapes[shape] = number * factor  # type: ignore[assignment]
        return Passes(shapes, self.logit_rows * factor, self.seconds * factor)


class Counted:
    """Counts the passes of a stand-in.

    Args:
        skeleton: the model on the meta device; it becomes the stand-in.
        device: that batches are sized for.
        dtype: of the logits.
    """

    def __init__(self, skeleton: MaskedDiffusionModel, device: str, dtype: torch.dtype) -> None:
        self.model, self._shapes, self._logit_rows = skeleton, Counter[Shape](), 0
        trunk = skeleton.trunk()
        del trunk.blocks[:]
        names = {module: name for name, module in skeleton.named_modules()}
        rows = trunk.embedding.num_embeddings
        embedding = _Table(rows, WIDTH, device=device, dtype=dtype)
        self._tables: list[nn.Embedding | nn.Linear] = [embedding]
        embedding.register_forward_hook(self._see_tokens)
        skeleton.set_submodule(names[trunk.embedding], embedding)
        skeleton.set_submodule(names[trunk.norm], nn.Identity())
        if trunk.head is not None:
            head = nn.Linear(WIDTH, rows, bias=False, device=device, dtype=dtype)
            skeleton.set_submodule(names[trunk.head], head)
            self._tables.append(head)
        project = skeleton.project

        def counted_project(normed: Tensor) -> Tensor:
            self._logit_rows += normed.numel() // WIDTH
            return project(normed)

        skeleton.project = counted_project  # type: ignore[method-assign]
        skeleton.requires_grad_(False).eval()

    def _see_tokens(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        rows, columns = arguments[0].shape
        self._shapes[rows, columns] += 1

    @contextmanager
    def of_few_words(self, words: int) -> Iterator[float]:
        """Predict so many words at the most; yields how many times as many there are.

        What a sampler does with the logits of a whole vocabulary would be most of the time, and is in proportion.
        """
        whole = [table.weight for table in self._tables]
        few = min(words, len(whole[0]))
        for table in self._tables:
            table.weight = nn.Parameter(table.weight[:few], requires_grad=False)
        try:
            yield len(whole[0]) / few
        finally:
            for table, weight in zip(self._tables, whole, strict=True):
                table.weight = weight

    @contextmanager
    def counting(self) -> Iterator[list[Passes]]:
        """Count what is done inside; the list holds it afterwards."""
        self._shapes.clear()
        counts: list[Passes] = []
        self._logit_rows, began = 0, time.perf_counter()
        yield counts
        counts.append(Passes(Counter(self._shapes), self._logit_rows, time.perf_counter() - began))

    def extrapolated(self, answer: Answer, sizes: Sequence[int] = SIZES) -> Passes:
        """Return the passes of all items, from those of the first few.

        Args:
            answer: goes through so many items; returns how many it was, and how many there are.
            sizes: to try, ascending.
        """
        done: list[tuple[int, int, Passes]] = []
        for size, patience in zip(sizes, PATIENCE, strict=False):
            with self.counting() as counts:
                count, total = answer(size)
            if not count:
                continue
            done.append((count, total, counts[0]))
            if count >= total or counts[0].seconds > patience:
                break
        count, total, passes = done[-1]
        if count >= total:
            return passes
        fewer, _, first = done[-2] if len(done) > 1 else (0, total, Passes())
        if len(done) == 1 or count == fewer:
            return passes.times(total / count)
        # What is done once (task lists, data files) is not done for every item.
        each = max(0.0, (passes.seconds - first.seconds) / (count - fewer))
        seconds = passes.seconds + each * (total - count)
        scaled = passes.times(total / count)
        return Passes(scaled.shapes, scaled.logit_rows, seconds)
