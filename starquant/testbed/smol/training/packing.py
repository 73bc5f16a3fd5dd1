"""Rows to train on: whole segments of several sources, several to a row, each seeing only itself.

A segment is a piece of natural text, or a task's prompt with its answer and end tokens up to a window's length. Rows
are a function of the seed and of their number, so that a training that goes on sees what it would have seen.

Shape suffixes: B rows, L tokens of a row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from starquant.errors import ConfigError, nearest
from starquant.testbed.items import Split, rng_for
from starquant.testbed.smol.tokenizer import BOS, EOS
from starquant.testbed.smol.training.documents import SHORTEST, Text, encode

LENGTH = 256
NATURAL = "natural"
#: Share of all tokens.
SHARES = {NATURAL: 0.38, "sums": 0.24, "programs": 0.15, "lists": 0.13, "reading": 0.10}
#: Tokens that an answer is filled up to with end tokens, one of these at random.
WINDOWS = {"sums": (48, 56, 64), "programs": (40, 48, 64), "lists": (24, 32, 40), "reading": (16, 24, 32)}
PIECES = (48, 96, 160, 224, 254)  # tokens of a piece of natural text
#: Segments of a row, of numbers 1 and on.
MOST_SEGMENTS = LENGTH // SHORTEST
SHARD_ROWS = 1024
_BOS_BEFORE_NATURAL, _BOS_BEFORE_TASK = 0.3, 0.5
_OPEN_ROWS = 24
_ITEMS_AT_ONCE = 256


class Prompted(Protocol):
    """An item of a task: what is asked, and what is to be answered."""

    @property
    def prompt(self) -> str:
        """What is asked."""

    @property
    def answer(self) -> str:
        """What is to be answered."""


#: Items of a task: (task, seed, count, split) -> as many items.
Stream = Callable[[str, int, int, Split], Iterable[Prompted]]


def default_stream() -> Stream:
    """Return the generator of the items that the package evaluates on."""
    from starquant.testbed.smol.tasks.items import stream

    items: Stream = stream
    return items


class Mark(IntEnum):
    """What a token is: text or a prompt, an answer with its first end token, an end token behind that."""

    TEXT = 0
    ANSWER = 1
    END = 2


@dataclass(frozen=True)
class Segment:
    """Tokens that see each other.

    Attributes:
        answer: where the answer starts, and where it ends behind its first end token; None for natural text.
    """

    ids: list[int]
    answer: tuple[int, int] | None = None


@dataclass(frozen=True)
class Rows:
    """Packed rows, each [B, L].

    Attributes:
        ids_BL: token ids.
        segment_BL: number of the segment in its row, from 1; 0 is padding.
        position_BL: place in the segment.
        mark_BL: values of `Mark`.
    """

    ids_BL: Tensor
    segment_BL: Tensor
    position_BL: Tensor
    mark_BL: Tensor

    def __len__(self) -> int:
        return len(self.ids_BL)

    def part(self, rows: slice) -> Rows:
        """Return some of the rows."""
        return Rows(self.ids_BL[rows], self.segment_BL[rows], self.position_BL[rows], self.mark_BL[rows])


def shares_with(changed: Mapping[str, float]) -> dict[str, float]:
    """Return every source's share: the changed ones, and the others in their usual proportions.

    Raises:
        ConfigError: a source of another name, or shares that do not make a whole.
    """
    for name, share in changed.items():
        if name not in SHARES:
            raise ConfigError(f"--share {name}: allowed: {', '.join(SHARES)}.{nearest(name, SHARES)}")
        if not 0 <= share <= 1:
            raise ConfigError(f"--share {name}={share:g}: allowed: 0 to 1")
    rest, kept = 1 - sum(changed.values()), sum(share for name, share in SHARES.items() if name not in changed)
    if rest < -1e-6 or (not kept and rest > 1e-6):
        raise ConfigError(f"--share: the shares sum to {1 - rest:g}, allowed: 1 (or less, where some are not named)")
    return {name: changed.get(name, share * max(rest, 0.0) / (kept or 1)) for name, share in SHARES.items()}


def task_segment(prompt: Sequence[int], answer: Sequence[int], window: int, bos: bool) -> Segment | None:
    """Return a task's segment, its answer filled up to `window` tokens, or None where it is longer than a row."""
    head = [BOS, *prompt] if bos else list(prompt)
    fill = max(window - len(answer), 1)
    if len(head) + len(answer) + fill > LENGTH:
        return None
    return Segment([*head, *answer, *[EOS] * fill], (len(head), len(head) + len(answer) + 1))


def pack(segments: Iterable[Segment], count: int) -> Rows:
    """Put segments, each whole, into the first of the rows begun last that has room; what finds no row is left out."""
    ids, number, position, mark = ([[0] * LENGTH for _ in range(count)] for _ in range(4))
    used, segments_of = [0] * count, [0] * count
    begun, open_rows = 0, list[int]()
    for segment in segments:
        size = len(segment.ids)
        assert SHORTEST <= size <= LENGTH, "a segment fits a row, and a row its segments' numbers"
        row = next((row for row in open_rows if used[row] + size <= LENGTH), None)
        if row is None:
            if begun == count:
                continue
            row, begun = begun, begun + 1
            open_rows = [*open_rows[-_OPEN_ROWS + 1 :], row]
        start, stop = used[row], used[row] + size
        used[row], segments_of[row] = stop, segments_of[row] + 1
        ids[row][start:stop] = segment.ids
        number[row][start:stop] = [segments_of[row]] * size
        position[row][start:stop] = range(size)
        if segment.answer is not None:
            answer, end = start + segment.answer[0], start + segment.answer[1]
            mark[row][answer:end] = [Mark.ANSWER] * (end - answer)
            mark[row][end:stop] = [Mark.END] * (stop - end)
        if LENGTH - stop < SHORTEST:
            open_rows.remove(row)
    small = (torch.tensor(rows, dtype=torch.uint8) for rows in (number, position, mark))
    return Rows(torch.tensor(ids, dtype=torch.int32), *small)


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        text: of this split; None where its share is 0.
    """

    tokenizer: Tokenizer
    stream: Stream
    shares: Mapping[str, float]
    split: Split
    seed: int
    text: Text | None = None

    def rows(self, part: int, count: int) -> Rows:
        """Return rows, the same for the same seed, part and count."""
        rng = rng_for("smol rows", self.split.value, self.seed, part)
        segments: list[Segment] = []
        for name, share in self.shares.items():
            wanted = round(share * count * LENGTH)
            segments += self._natural(rng, wanted) if name == NATURAL else self._task(rng, name, wanted)
        rng.shuffle(segments)
        return pack(segments, count)

    def _natural(self, rng: random.Random, wanted: int) -> Iterator[Segment]:
        while wanted > 0:
            assert self.text is not None, "natural text has a share and no text"
            piece = self.text.piece(rng, rng.choice(PIECES))
            segment = Segment([BOS, *piece] if rng.random() < _BOS_BEFORE_NATURAL else piece)
            wanted -= len(segment.ids)
            yield segment

    def _task(self, rng: random.Random, task: str, wanted: int) -> Iterator[Segment]:
        while wanted > 0:
            items = list(self.stream(task, rng.getrandbits(62), _ITEMS_AT_ONCE, self.split))
            prompts = encode(self.tokenizer, (item.prompt for item in items))
            answers = encode(self.tokenizer, (item.answer for item in items))
            for prompt, answer in zip(prompts, answers, strict=True):
                bos = rng.random() < _BOS_BEFORE_TASK
                segment = task_segment(prompt, answer, rng.choice(WINDOWS[task]), bos)
                if segment is not None and wanted > 0:
                    wanted -= len(segment.ids)
                    yield segment


class _Shards(Dataset[Rows]):
    """Rows by the shard; a worker process holds a copy."""

    def __init__(self, source: Source, rows: int) -> None:
        self.source, self.rows = source, rows

    def __getitem__(self, index: int) -> Rows:
        return self.source.rows(index, self.rows)


def batches(
    source: Source, batch: int, steps: range, workers: int = 0, shard_rows: int = SHARD_ROWS
) -> Generator[Rows, None, None]:
    """Yield the rows of each step, `batch` of them.

    Args:
        source: of the rows.
        batch: rows of a step.
        steps: to be made; those before are left out, not packed (but for those of the first step's shard).
        workers: processes that pack ahead; 0 packs here.
        shard_rows: about as many rows are packed at once; another number gives other rows.
    """
    steps_a_shard = max(1, shard_rows // batch)
    first, last = steps.start // steps_a_shard, -(-steps.stop // steps_a_shard)
    shards = DataLoader(
        _Shards(source, steps_a_shard * batch),
        sampler=range(first, last),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),
    )
    step = first * steps_a_shard
    for shard in shards:
        for row in range(0, len(shard), batch):
            if step in steps:
                yield shard.part(slice(row, row + batch))
            step += 1
