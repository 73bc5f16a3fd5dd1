"""Text that comes with the test-beds: items of their generators, and natural text."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from itertools import chain, islice, zip_longest

from transformers import PreTrainedTokenizerBase

from starquant.calibration.batches import Segment
from starquant.calibration.cutting import consecutive, encode
from starquant.config.calibration import SourceSpec
from starquant.errors import ConfigError, DataError
from starquant.testbed import smol
from starquant.testbed.items import ANSWER_LENGTH, Item, Split, rng_for
from starquant.testbed.smol import ANSWER_LENGTHS
from starquant.testbed.smol.tasks.items import stream
from starquant.testbed.tiny import arithmetic, programs, world

#: Kinds of sources that are read from no file and no hub.
KINDS = ("testbed", "smol", "smol_tasks", "smol_text")
#: Tasks of the embedded model whose answers are generated, not chosen.
GENERATED = ("arithmetic", "programs")
_MISSES = 2000  # draws in a row that bring nothing new: the generator is exhausted


def digest_of_text(spec: SourceSpec) -> str:
    """Return 16 hex digits that stand for the text of a source.

    Of the embedded model all its items count, of smol's generators the first of each task (the rest is decided by code,
    which has a digest of its own), of natural text the whole.
    """
    digest = hashlib.sha256(f"{spec.kind}/{spec.split}\n".encode())
    split = Split(spec.split)
    if spec.kind == "testbed":
        for task, item in testbed_items(split, spec.segments, seed=0):
            digest.update(f"{task}\t{item.prompt}\t{item.answer}\n".encode())
    if spec.kind in ("smol", "smol_tasks"):
        for task in ANSWER_LENGTHS:
            for new in stream(task, 0, 16, split):
                digest.update(f"{task}\t{new.prompt}\t{new.answer}\n".encode())
    if spec.kind in ("smol", "smol_text"):
        digest.update(smol.natural_text(split).encode())
    return digest.hexdigest()[:16]


def shipped_segments(spec: SourceSpec, tokenizer: PreTrainedTokenizerBase, seed: int, where: str) -> list[Segment]:
    """Return up to `spec.segments` segments of one of `KINDS`.

    Raises:
        ConfigError: items that are longer than `spec.length`.
        DataError: more segments than there are items.
    """
    if spec.kind == "testbed":
        return _testbed(spec, tokenizer, seed, where)
    texts = {"smol": -(-spec.segments // 2), "smol_text": spec.segments, "smol_tasks": 0}[spec.kind]
    text = _smol_text(spec, texts, tokenizer, seed) if texts else []
    tasks = _smol_tasks(spec, spec.segments - texts, tokenizer, seed, where) if texts < spec.segments else []
    in_turn = chain.from_iterable(zip_longest(text, tasks))
    return [segment for segment in in_turn if segment is not None]


def _smol_text(spec: SourceSpec, count: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Segment]:
    """Cut the natural text; the first token of a segment always stays visible, since nothing comes before it."""
    segments = consecutive(smol.natural_text(Split(spec.split)), tokenizer, spec.length)
    random.Random(seed).shuffle(segments)
    return [Segment(s.ids, 1, s.text, "text") for s in segments[:count]]


def _smol_tasks(
    spec: SourceSpec, count: int, tokenizer: PreTrainedTokenizerBase, seed: int, where: str
) -> list[Segment]:
    """Take the four tasks in turn; answers are padded with end tokens, as a generated answer ends."""
    each = -(-count // len(ANSWER_LENGTHS))
    try:
        streams = [[(task, item) for item in stream(task, seed, each, Split(spec.split))] for task in ANSWER_LENGTHS]
    except ValueError as error:
        raise DataError(f"{where}.segments: got {spec.segments}, but {error}") from None
    segments = []
    for task, item in islice(chain.from_iterable(zip(*streams, strict=True)), count):
        prompt, answer = encode(tokenizer, item.prompt), encode(tokenizer, item.answer)
        answer += [int(tokenizer.eos_token_id)] * (ANSWER_LENGTHS[task] - len(answer))
        segments.append(Segment((*prompt, *answer), len(prompt), item.prompt + item.answer, "tasks"))
    return _fitting(segments, spec, where)


def testbed_items(split: Split, count: int, seed: int) -> list[tuple[str, Item]]:
    """Return up to `count` (task, item), three tasks in turn, no key twice; fewer when a task has no more.

    Facts are left out: their answers are one token, so that a trajectory over an answer's eight would leave what the
    model was trained on.
    """
    tasks = {
        "profiles": _distinct("profiles", world.random_profile, split, seed),
        "arithmetic": _distinct("arithmetic", arithmetic.random_problem, split, seed),
        "programs": _distinct("programs", programs.random_task, split, seed),
    }
    chosen: list[tuple[str, Item]] = []
    while True:
        for task, items in tasks.items():
            item = next(items, None)
            if item is None or len(chosen) == count:
                return chosen
            chosen.append((task, item))


def _distinct(task: str, draw: Callable[[random.Random, Split], Item], split: Split, seed: int) -> Iterator[Item]:
    rng = rng_for("source", task, split.value, seed)
    seen: set[str] = set()
    misses = 0
    while misses < _MISSES:
        item = draw(rng, split)
        misses = misses + 1 if item.key in seen else 0
        if not misses:
            seen.add(item.key)
            yield item


def _testbed(spec: SourceSpec, tokenizer: PreTrainedTokenizerBase, seed: int, where: str) -> list[Segment]:
    segments = []
    for task, item in testbed_items(Split(spec.split), spec.segments, seed):
        prompt, answer = encode(tokenizer, item.prompt), encode(tokenizer, f" {item.answer}")
        if task in GENERATED:
            answer += [int(tokenizer.eos_token_id)] * (ANSWER_LENGTH - len(answer))
        segments.append(Segment((*prompt, *answer), len(prompt), f"{item.prompt} {item.answer}"))
    return _fitting(segments, spec, where)


def _fitting(segments: list[Segment], spec: SourceSpec, where: str) -> list[Segment]:
    longest = max(len(segment.ids) for segment in segments)
    if longest > spec.length:
        raise ConfigError(f"{where}.length: got {spec.length}, allowed: at least {longest} for these testbed items")
    return segments
