"""A checkpoint's tokenizer as keys of a GGUF: byte-level BPE by name; any other as none, for who brings the ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from starquant.errors import ConfigError

#: Token types of GGUF.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

#: What llama.cpp calls a way of cutting text, by the pattern in tokenizer.json.
PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": (
        "bailingmoe"
    ),
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of a tokenizer.

    Attributes:
        model: "gpt2" (byte-level BPE), or "none".
        pre: llama.cpp's name for how text is cut first; empty for no tokenizer.
        tokens: by id.
        types: of the tokens.
        merges: in order.
        chat_template: None for none.
    """

    model: str
    pre: str = ""
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    merges: tuple[str, ...] = ()
    chat_template: str | None = None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Return what a GGUF says of a tokenizer.

    Args:
        tokenizer: of the checkpoint.
        rows: of the embedding: ids without a token get one of their own, of type "unused".

    Raises:
        ConfigError: more tokens than rows; byte-level BPE that cuts text in a way that llama.cpp has no name for.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    cuts = _cuts(data.get("pre_tokenizer"))
    if data["model"]["type"] != "BPE" or not any(cut["type"] == "ByteLevel" for cut in cuts):
        return Vocabulary("none")
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    if max(words) >= rows:
        raise ConfigError(f"export.format: got a tokenizer of {max(words) + 1} tokens for {rows} rows of the embedding")
    added = {int(index): bool(token.special) for index, token in tokenizer.added_tokens_decoder.items()}
    types = []
    for index in range(rows):
        if index in added:
            types.append(CONTROL if added[index] else USER_DEFINED)
        else:
            types.append(NORMAL if index in words else UNUSED)
    tokens = tuple(words.get(index, f"[PAD{index}]") for index in range(rows))
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"])
    template = tokenizer.chat_template
    return Vocabulary(
        "gpt2", _name_of(cuts), tokens, tuple(types), merges, template if isinstance(template, str) else None
    )


def _cuts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [cut for part in pre_tokenizer["pretokenizers"] for cut in _cuts(part)]
    return [pre_tokenizer]


def _name_of(cuts: list[dict[str, Any]]) -> str:
    """Return llama.cpp's name for the steps in which text is cut."""
    kinds = [cut["type"] for cut in cuts]
    by_regex = bool(cuts[-1].get("use_regex", True))
    if kinds == ["Digits", "ByteLevel"] and cuts[0].get("individual_digits") and by_regex:
        return "smollm"
    if kinds == ["ByteLevel"] and by_regex:
        return "gpt-2"
    patterns = [str(cut["pattern"].get("Regex")) for cut in cuts if cut["type"] == "Split"]
    if kinds == ["Split", "ByteLevel"] and not by_regex and patterns[0] in PATTERNS:
        return PATTERNS[patterns[0]]
    raise ConfigError(
        f"export.format: got a tokenizer that cuts text by {', '.join(kinds)} {patterns}, which llama.cpp has no name "
        f"for here; allowed: what it calls smollm, gpt-2, {', '.join(PATTERNS.values())}"
    )
