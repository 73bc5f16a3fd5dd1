"""Prompts beside a model's context: what does not fit is cut, counted by item and said; [MASK] in a text is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance

from starquant.errors import DataError

#: A leaf task, and the number of a document in it (lm-eval's `doc_id`).
Item = tuple[str, int]
#: Score of a task -> what is cut of its items: a prompt loses its beginning, an answer to score its end.
CUT = {
    "cut_prompts": "prompts do not fit the model's context of {} tokens beside their answers and lose their beginning",
    "cut_answers": "answers to score do not fit the model's context of {} tokens by themselves and lose their end",
}


class CutItems:
    """Items of a task of which the model sees a part only, by the names of `CUT`.

    Attributes:
        seen: items that were looked at.
    """

    def __init__(self) -> None:
        self.seen: set[Item] = set()
        self._cut: dict[str, set[Item]] = {metric: set() for metric in CUT}

    def add(self, item: Item, **cut: bool) -> None:
        """Look at an item: which of `CUT` holds of it."""
        self.seen.add(item)
        for metric in (name for name, holds in cut.items() if holds):
            self._cut[metric].add(item)

    def __or__(self, other: CutItems) -> CutItems:
        """Return what two processes have looked at together."""
        both = CutItems()
        both.seen = self.seen | other.seen
        both._cut = {metric: self._cut[metric] | other._cut[metric] for metric in CUT}
        return both

    def shares(self) -> dict[str, float]:
        """Return the share of items of which something is cut, by metric; nothing where nothing is."""
        return {metric: len(items) / len(self.seen) for metric, items in self._cut.items() if items}

    def sentences(self, task: str, context_length: int) -> Iterator[str]:
        """Yield a line for each kind of cut there was."""
        for metric, items in self._cut.items():
            if items:
                what = CUT[metric].format(context_length)
                yield f"{task}: of {len(items)} of {len(self.seen)} items, {what} ({metric})"

    def by_leaf(self) -> Mapping[str, CutItems]:
        """Return the items of each leaf task."""
        leaves: dict[str, CutItems] = {}
        for item in sorted(self.seen):
            cut = {metric: item in items for metric, items in self._cut.items()}
            leaves.setdefault(item[0], CutItems()).add(item, **cut)
        return leaves


def item_of(request: Instance, task: str) -> Item:
    """Return which item a request is of; `task` names one of a request that does not say."""
    return request.task_name or task, request.idx if request.doc_id is None else request.doc_id


def validate_unmasked(
    items: Sequence[Item], texts: Sequence[Collection[int]], mask_id: int, decode: Callable[[list[int]], Any]
) -> None:
    """Refuse texts that hold [MASK]: a model would take it for a token to fill in.

    Args:
        items: that the texts are of.
        texts: token ids of each.
        mask_id: id of [MASK].
        decode: ids to text, for the message.

    Raises:
        DataError: naming the task and the item.
    """
    for (task, number), ids in zip(items, texts, strict=True):
        if mask_id in ids:
            raise DataError(
                f"{task}, item {number}: its text holds {str(decode([mask_id]))!r}, which the tokenizer turns into the "
                f"model's mask token (id {mask_id}); allowed: text without it"
            )
