"""Text -> segments of tokens, the same for the same seed on every machine."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

from transformers import PreTrainedTokenizerBase

from starquant.calibration.batches import Segment
from starquant.calibration.cutting import consecutive, encode, segments_of_file
from starquant.calibration.datasets import (
    DATA_SETS,
    is_on_hub,
    rows,
    shuffled,
    source_file,
    text_field,
    validate_source,
)
from starquant.calibration.json_lines import pieces
from starquant.calibration.shipped_text import KINDS as SHIPPED
from starquant.calibration.shipped_text import digest_of_text, shipped_segments
from starquant.config.calibration import SourceSpec
from starquant.diffusion.special_tokens import cut_left
from starquant.errors import ConfigError, DataError

__all__ = ["fingerprint", "is_on_hub", "prompts_of", "read_segments", "source_file"]

log = logging.getLogger(__name__)

BLANK_LINE = "\n\n"
_TOKENS_AN_ITEM = 16  # first guess of a WinoGrande sentence's tokens


def fingerprint(spec: SourceSpec, data_dir: str | None, where: str = "calibration.source") -> str:
    """Return 16 hex digits that stand for the text a source is read from, wherever it lies.

    A file counts by its bytes, a data set of the hub by its name, split and items, generated items by their text.

    Raises:
        ConfigError: a split or path the kind does not have.
        DataError: a missing or unreadable file, a data set the hub does not give.
    """
    validate_source(spec, where)
    path = source_file(spec, data_dir)
    if path is not None:
        content = hashlib.sha256()
        for piece in pieces(path, f"{where}.path: {path}"):
            content.update(piece)
        return content.hexdigest()[:16]
    if spec.kind in SHIPPED:
        return digest_of_text(spec)
    digest = hashlib.sha256(f"{spec.kind}/{spec.split}\n".encode())
    digest.update("/".join(DATA_SETS[spec.kind].hub).encode())
    for _, fields in rows(spec, data_dir, where):
        digest.update(json.dumps([fields.get(name) for name in DATA_SETS[spec.kind].fields]).encode())
    return digest.hexdigest()[:16]


def read_segments(
    spec: SourceSpec,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    *,
    seed: int,
    data_dir: str | None = None,
    where: str = "calibration.source",
    mask_id: int | None = None,
) -> list[Segment]:
    """Return `spec.segments` segments of at most `spec.length` tokens.

    "winogrande" and .txt files give plain text in consecutive, non-overlapping segments of exactly that length, of a
    large .txt file from pieces here and there until there are enough. Every other source gives one item a segment, its
    answer (or text) cut at the length, and skips items whose prompt leaves no room. Prompt and answer are tokenized
    apart, as generation sees them.

    Args:
        spec: the source.
        tokenizer: of the model; a fast one (character offsets are read).
        context_length: tokens the model's context holds.
        seed: of the choice and order of items.
        data_dir: folder of the offline data sets (docs/offline-data.md), None for the hub.
        where: dotted path of the source, for messages.
        mask_id: the model's id of [MASK]; None takes the tokenizer's, which may name none.

    Raises:
        ConfigError: a length beyond the context, a split or path the kind does not have.
        DataError: a missing or empty file, a malformed line, [MASK] in the text, fewer segments than asked for.
    """
    validate_source(spec, where)
    if spec.length > context_length:
        raise ConfigError(
            f"{where}.length: got {spec.length}, allowed: at most the model's context of {context_length} tokens"
        )
    order = random.Random(seed)
    path = source_file(spec, data_dir)
    if spec.kind in SHIPPED:
        segments = shipped_segments(spec, tokenizer, seed, where)
    elif spec.kind == "winogrande":
        segments = _winogrande(spec, tokenizer, order, data_dir, where)
    elif spec.kind == "text" and path is not None and path.suffix == ".txt":
        segments = segments_of_file(path, f"{where}.path: {path}", tokenizer, spec.length, spec.segments, order)
    else:
        segments = _items(spec, tokenizer, order, data_dir, where)
    _validate_segments(segments, spec, tokenizer, where, mask_id)
    return segments[: spec.segments]


def prompts_of(
    segments: Sequence[Segment],
    answer_length: int,
    context_length: int,
    where: str = "calibration.source",
    bos: int | None = None,
) -> list[tuple[int, ...]]:
    """Return the prompt to denoise an answer from for each segment: its own, or the first half of plain text.

    Prompts are cut on the left, behind `bos` where they begin with it, so that `answer_length` more tokens fit the
    context; a line of the log says how many.

    Raises:
        ConfigError: an answer that fills the context.
    """
    room = context_length - answer_length
    if room < 1:
        raise ConfigError(
            f"model.trajectory: the answer's {answer_length} tokens do not fit the model's context of "
            f"{context_length} tokens beside a prompt"
        )
    prompts = [s.ids[: s.prompt_length or max(1, len(s.ids) // 2)] for s in segments]
    cut = sum(len(prompt) > room for prompt in prompts)
    if cut:
        log.warning(
            "%s: %d of %d prompts leave no room for an answer of %d tokens in the model's context of %d and lose their "
            "beginning",
            *(where, cut, len(prompts), answer_length, context_length),
        )
    return [tuple(cut_left(prompt, room, bos)) for prompt in prompts]


def _validate_segments(
    segments: Sequence[Segment],
    spec: SourceSpec,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    mask_id: int | None,
) -> None:
    if len(segments) < spec.segments:
        raise DataError(
            f"{where}.segments: got {spec.segments}, but the source ({spec.path or spec.kind}) has {len(segments)} "
            f"segments at {where}.length = {spec.length}"
        )
    mask = tokenizer.mask_token_id if mask_id is None else mask_id
    if mask is not None and any(mask in segment.ids for segment in segments[: spec.segments]):
        token = tokenizer.convert_ids_to_tokens(mask)
        raise DataError(f"{where}: the text holds the mask token {token}, which stands for no text")


def _winogrande(
    spec: SourceSpec, tokenizer: PreTrainedTokenizerBase, order: random.Random, data_dir: str | None, where: str
) -> list[Segment]:
    local = not is_on_hub(spec, data_dir)
    stream = shuffled(spec, data_dir, where, order, partial(_sentence, exact=local))
    sentences: list[str] = []
    taken = spec.segments * spec.length // _TOKENS_AN_ITEM + 1
    while True:
        sentences += islice(stream, taken - len(sentences))
        segments = consecutive(BLANK_LINE.join(sentences), tokenizer, spec.length, whole=BLANK_LINE)
        # One to spare: the last tokens of a text that is cut off may not be those of the longer text.
        if len(segments) > spec.segments or len(sentences) < taken:
            return segments
        taken *= 2


def _sentence(place: str, item: dict[str, object], exact: bool = True) -> str:
    """Return a sentence with its answer filled in; `exact` refuses what fills no more than one gap, or says nothing."""
    sentence, answer = text_field(item, "sentence", place), text_field(item, "answer", place)
    options = {"1": text_field(item, "option1", place), "2": text_field(item, "option2", place)}
    if answer not in options:
        raise DataError(f"{place}: field 'answer' is {answer!r}, allowed: '1' or '2'")
    gaps = sentence.count("_")
    if not gaps or (exact and gaps > 1):
        raise DataError(f"{place}: field 'sentence' has {gaps} '_', allowed: one, the gap to fill in")
    if exact and options["1"].strip() == options["2"].strip():
        raise DataError(f"{place}: field 'option2' is {options['2']!r}, allowed: another text than option1")
    return sentence.replace("_", options[answer], 1).strip()


def _prompt_and_answer(spec: SourceSpec, place: str, item: dict[str, object]) -> tuple[str, str]:
    """As lm-eval's gsm8k prompt; of a text file, the fields as they are, "text" having no prompt."""
    if spec.kind == "gsm8k":
        question, answer = text_field(item, "question", place), text_field(item, "answer", place)
        return f"Question: {question}\nAnswer:", f" {answer}"
    if "text" in item:
        return "", text_field(item, "text", place)
    if "prompt" not in item:
        raise DataError(f"{place}: missing field 'text' (or 'prompt' and 'answer')")
    return text_field(item, "prompt", place), text_field(item, "answer", place)


def _items(
    spec: SourceSpec, tokenizer: PreTrainedTokenizerBase, order: random.Random, data_dir: str | None, where: str
) -> list[Segment]:
    pairs = shuffled(spec, data_dir, where, order, partial(_prompt_and_answer, spec))
    return list(_fitting(pairs, tokenizer, spec))


def _fitting(
    pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, spec: SourceSpec
) -> Iterator[Segment]:
    count = 0
    for prompt, answer in pairs:
        if count == spec.segments:
            return
        prompt_ids, answer_ids = encode(tokenizer, prompt) if prompt else [], encode(tokenizer, answer)
        if len(prompt_ids) < spec.length and answer_ids:
            count += 1
            yield Segment(tuple((prompt_ids + answer_ids)[: spec.length]), len(prompt_ids), prompt + answer)
