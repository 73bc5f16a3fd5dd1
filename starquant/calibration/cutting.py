"""Plain text -> segments of equally many tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import IO

from transformers import PreTrainedTokenizerBase

from starquant.calibration.batches import Segment
from starquant.calibration.json_lines import opened, validate_text

WHOLE = 1 << 18  # bytes of a file that is cut as a whole
_BYTES_A_TOKEN = 4  # about; eight segments a piece


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


def segments_of_file(
    path: Path, place: str, tokenizer: PreTrainedTokenizerBase, length: int, count: int, order: random.Random
) -> list[Segment]:
    """Cut a text file; of one over `WHOLE` bytes, pieces in random order until they give `count` segments.

    Args:
        path: of the file.
        place: that an error names.
        tokenizer: of the model.
        length: tokens of a segment.
        count: of segments that are enough.
        order: of pieces and segments.

    Raises:
        DataError: a file that cannot be read, is empty or not UTF-8; it is judged to its end first.
    """
    size = validate_text(path, place)
    step = size if size <= WHOLE else 8 * _BYTES_A_TOKEN * length
    starts = list(range(0, size, step))
    if len(starts) > 1:
        order.shuffle(starts)
    segments: list[Segment] = []
    with opened(path, place) as stream:
        for start in starts:
            first, last = _boundary(stream, start, step, size), _boundary(stream, start + step, step, size)
            stream.seek(first)
            segments += consecutive(stream.read(last - first).decode("utf-8"), tokenizer, length)
            if len(segments) >= count and len(starts) > 1:
                break
    order.shuffle(segments)
    return segments


def _boundary(stream: IO[bytes], position: int, step: int, size: int) -> int:
    """Return where the piece that begins at about `position` begins: after a line, else a blank, else a character."""
    if position == 0 or position >= size:
        return min(position, size)
    stream.seek(position)
    window = stream.read(step)
    for end in (b"\n", b" "):
        if (after := window.find(end) + 1) > 0:
            return position + after
    return position + next((index for index, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)
