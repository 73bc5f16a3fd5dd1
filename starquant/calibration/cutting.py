"""Plain text -> segments of equally many tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from starquant.calibration.batches import Segment


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def consecutive(text: str, tokenizer: PreTrainedTokenizerBase, length: int, whole: str | None = None) -> list[Segment]:
    """Cut a text every `length` tokens; with `whole`, `Segment.text` holds the parts between it unbroken."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    segments = []
    for begin in range(0, len(ids) - length + 1, length):
        first, last = offsets[begin][0], offsets[begin + length - 1][1]
        if whole is not None:
            earlier, later = text.rfind(whole, 0, first), text.find(whole, last)
            first = 0 if earlier < 0 else earlier + len(whole)
            last = len(text) if later < 0 else later
        segments.append(Segment(tuple(ids[begin : begin + length]), 0, text[first:last]))
    return segments
