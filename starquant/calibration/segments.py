"""Text -> segments of tokens, the same for the same seed on every machine."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from starquant.calibration.batches import Segment
from starquant.calibration.datasets import (
    DATA_SETS,
    GENERATED,
    read_bytes,
    read_text,
    rows,
    source_file,
    testbed_items,
    text_field,
    validate_source,
)
from starquant.config.calibration import SourceSpec
from starquant.errors import ConfigError, DataError
from starquant.testbed.items import ANSWER_LENGTH, Split

__all__ = ["fingerprint", "prompts_of", "read_segments", "source_file"]

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
        return hashlib.sha256(read_bytes(path, where)).hexdigest()[:16]
    digest = hashlib.sha256(f"{spec.kind}/{spec.split}\n".encode())
    if spec.kind == "testbed":
        for task, item in testbed_items(Split(spec.split), spec.segments, seed=0):
            digest.update(f"{task}\t{item.prompt}\t{item.answer}\n".encode())
    else:
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
) -> list[Segment]:
    """Return `spec.segments` segments of at most `spec.length` tokens.

    "winogrande" and .txt files give plain text in consecutive, non-overlapping segments of exactly that length;
    every other source gives one item a segment, its answer (or text) cut at the length, and skips items whose
    prompt leaves no room. Prompt and answer are tokenized apart, as generation sees them.

    Args:
        spec: the source.
        tokenizer: of the model; a fast one (character offsets are read).
        context_length: tokens the model's context holds.
        seed: of the choice and order of items.
        data_dir: folder of the offline data sets (docs/offline-data.md), None for the hub.
        where: dotted path of the source, for messages.

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
    if spec.kind == "testbed":
        segments = _testbed(spec, tokenizer, seed, where)
    elif spec.kind == "winogrande":
        segments = _winogrande(spec, tokenizer, order, data_dir, where)
    elif spec.kind == "text" and path is not None and path.suffix == ".txt":
        segments = _consecutive(read_text(path, where), tokenizer, spec.length)
        order.shuffle(segments)
    else:
        segments = _items(spec, tokenizer, order, data_dir, where)
    _validate_segments(segments, spec, tokenizer, where)
    return segments[: spec.segments]


def prompts_of(segments: Sequence[Segment], answer_length: int, context_length: int) -> list[tuple[int, ...]]:
    """Return the prompt to denoise an answer from for each segment: its own, or the first half of plain text.

    Prompts are cut on the left so that `answer_length` more tokens fit the context.

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
    return [prompt[-room:] for prompt in prompts]


def _validate_segments(
    segments: Sequence[Segment], spec: SourceSpec, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    if len(segments) < spec.segments:
        raise DataError(
            f"{where}.segments: got {spec.segments}, but the source ({spec.path or spec.kind}) has {len(segments)} "
            f"segments at {where}.length = {spec.length}"
        )
    mask = tokenizer.mask_token_id
    if mask is not None and any(mask in segment.ids for segment in segments[: spec.segments]):
        raise DataError(f"{where}: the text holds the mask token {tokenizer.mask_token}, which stands for no text")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _consecutive(text: str, tokenizer: PreTrainedTokenizerBase, length: int, whole: str | None = None) -> list[Segment]:
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


def _winogrande(
    spec: SourceSpec, tokenizer: PreTrainedTokenizerBase, order: random.Random, data_dir: str | None, where: str
) -> list[Segment]:
    sentences = [_sentence(place, item) for place, item in rows(spec, data_dir, where)]
    order.shuffle(sentences)
    taken = spec.segments * spec.length // _TOKENS_AN_ITEM + 1
    while True:
        segments = _consecutive(BLANK_LINE.join(sentences[:taken]), tokenizer, spec.length, whole=BLANK_LINE)
        # One to spare: the last tokens of a text that is cut off may not be those of the longer text.
        if len(segments) > spec.segments or taken >= len(sentences):
            return segments
        taken *= 2


def _sentence(place: str, item: dict[str, object]) -> str:
    sentence, answer = text_field(item, "sentence", place), text_field(item, "answer", place)
    options = {"1": text_field(item, "option1", place), "2": text_field(item, "option2", place)}
    if answer not in options:
        raise DataError(f"{place}: field 'answer' is {answer!r}, allowed: '1' or '2'")
    if "_" not in sentence:
        raise DataError(f"{place}: field 'sentence' has no '_' to fill in")
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
    pairs = [_prompt_and_answer(spec, place, item) for place, item in rows(spec, data_dir, where)]
    order.shuffle(pairs)
    return list(_fitting(pairs, tokenizer, spec))


def _fitting(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, spec: SourceSpec
) -> Iterator[Segment]:
    count = 0
    for prompt, answer in pairs:
        if count == spec.segments:
            return
        prompt_ids, answer_ids = _encode(tokenizer, prompt) if prompt else [], _encode(tokenizer, answer)
        if len(prompt_ids) < spec.length and answer_ids:
            count += 1
            yield Segment(tuple((prompt_ids + answer_ids)[: spec.length]), len(prompt_ids), prompt + answer)


def _testbed(spec: SourceSpec, tokenizer: PreTrainedTokenizerBase, seed: int, where: str) -> list[Segment]:
    segments = []
    for task, item in testbed_items(Split(spec.split), spec.segments, seed):
        prompt, answer = _encode(tokenizer, item.prompt), _encode(tokenizer, f" {item.answer}")
        if task in GENERATED:
            answer += [int(tokenizer.eos_token_id)] * (ANSWER_LENGTH - len(answer))
        segments.append(Segment((*prompt, *answer), len(prompt), f"{item.prompt} {item.answer}"))
    longest = max(len(segment.ids) for segment in segments)
    if longest > spec.length:
        raise ConfigError(f"{where}.length: got {spec.length}, allowed: at least {longest} for these testbed items")
    return segments
