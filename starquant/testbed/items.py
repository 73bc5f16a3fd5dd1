"""One item of the embedded model's tasks, and the split that keeps training and held-out items apart."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from enum import Enum

#: Tokens that a generated answer has room for: it is padded to as many, in training and in calibration.
ANSWER_LENGTH = 8


class Split(str, Enum):
    """Where an item may be used: fitting the model, choosing hyper-parameters, or the final test."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True)
class Item:
    """A prompt and its answer, both whitespace-separated words of the embedded tokenizer.

    Attributes:
        key: the item's identity, independent of the wording: names the fact or problem that is asked.
        choices: for likelihood tasks, the candidate answers; `answer` is one of them.
        hidden: for program tasks, (input, output) pairs that the prompt does not show.
    """

    prompt: str
    answer: str
    key: str
    choices: tuple[str, ...] = ()
    hidden: tuple[tuple[int, int], ...] = field(default=())


def split_of(key: str) -> Split:
    """Assign a key to a split by its hash: a tenth to test, a tenth to validation, the rest to training."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    return {0: Split.TEST, 1: Split.VALIDATION}.get(bucket, Split.TRAIN)


def rng_for(*parts: object) -> random.Random:
    """Return a generator seeded by the given parts, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
