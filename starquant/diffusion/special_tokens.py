"""Ids that a model's configuration gives to the ends of texts and to padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starquant.errors import CheckpointError


def eos_token_ids(config: Any) -> tuple[int, ...]:
    """Return every id of end-of-text, as `eos_token_id` lists them; empty where it names none."""
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        return ()
    return tuple(map(int, ids)) if isinstance(ids, list | tuple) else (int(ids),)


def eos_token_id(config: Any) -> int:
    """Return the end-of-text that is written: the first one.

    Raises:
        CheckpointError: the configuration names none.
    """
    ids = eos_token_ids(config)
    if not ids:
        raise CheckpointError(
            f"config.json: eos_token_id is {getattr(config, 'eos_token_id', None)!r}; needed: where an answer ends"
        )
    return ids[0]


def end_token_ids(config: Any) -> frozenset[int]:
    """Return the ids that end an answer: end-of-text and end-of-turn.

    Raises:
        CheckpointError: the configuration names no end-of-text.
    """
    eos_token_id(config)
    eot = getattr(config, "eot_token_id", None)
    return frozenset((*eos_token_ids(config), *(() if eot is None else (int(eot),))))


def padding_id(config: Any) -> int:
    """Return an id for padding, which nothing sees: end-of-text, or any."""
    return next(iter(eos_token_ids(config)), 0)


def cut_left(ids: Sequence[int], room: int, bos: int | None = None) -> list[int]:
    """Return the end of a prompt that has `room` tokens at most; a beginning-of-text stays in front of it."""
    if len(ids) <= room:
        return [*ids]
    head = [*ids[:1]] if room and bos is not None and ids[0] == bos else []
    return [*head, *ids[len(ids) - room + len(head) :]]
