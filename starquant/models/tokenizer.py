"""Tokenizers of checkpoint folders, without running their code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

from starquant.errors import CheckpointError, ConfigError
from starquant.models.checkpoint import read_json

_BPE_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast", None)


#: Either is a tokenizer: one file, or a vocabulary and its merges.
TOKENIZER, BPE = "tokenizer.json", ("vocab.json", "merges.txt")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds the files of a tokenizer."""
    return (folder / TOKENIZER).exists() or all((folder / name).exists() for name in BPE)


def load_fast(folder: Path) -> PreTrainedTokenizerBase:
    """Load `tokenizer.json`.

    Raises:
        CheckpointError: it is missing or malformed, or a listed token gets another id.
    """
    if not (folder / TOKENIZER).exists():
        raise CheckpointError(f"{folder}: no tokenizer: neither tokenizer.json nor vocab.json with merges.txt is there")
    return _from_folder(PreTrainedTokenizerFast, folder)


def load_byte_level_bpe(folder: Path) -> PreTrainedTokenizerBase:
    """Build Qwen2's byte-level BPE of `vocab.json` and `merges.txt`, or load `tokenizer.json` where there are none.

    Dream ships a Python class over that BPE: the same is built here, with the special tokens its config lists.

    Raises:
        CheckpointError: as `load_fast`.
    """
    if all((folder / name).exists() for name in BPE) and _config(folder).get("tokenizer_class") in _BPE_CLASSES:
        return _from_folder(Qwen2Tokenizer, folder)
    return load_fast(folder)


def validate_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a tokenizer without a chat template that renders a question.

    Args:
        tokenizer: of a checkpoint.
        where: what asks for it, for the error.

    Raises:
        ConfigError: there is none.
        CheckpointError: it cannot be rendered.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{where}: got auto, but the checkpoint has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); allowed: none"
        )
    render_chat(tokenizer, [{"role": "user", "content": "?"}])


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], answer_begins: bool = True
) -> str:
    """Return a conversation as the text that a checkpoint's chat template makes of it.

    Args:
        tokenizer: of a checkpoint.
        messages: role and content of each turn.
        answer_begins: end with the header of an answer; False lets the last message be gone on with.

    Raises:
        CheckpointError: no template, or one that cannot be rendered.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=answer_begins,
                continue_final_message=not answer_begins,
            )
        )
    except Exception as error:  # a template raises what it likes
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{tokenizer.name_or_path}: its chat template cannot be rendered: {why}") from error


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _from_folder(kind: type[PreTrainedTokenizerBase], folder: Path) -> PreTrainedTokenizerBase:
    config, verbosity = _config(folder), transformers_logging.get_verbosity()
    longest = config.get("model_max_length")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: model_max_length: got {str(longest)[:40]!r}, allowed: above 0"
        )
    transformers_logging.set_verbosity_error()  # it would remark that the class name differs
    try:
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on malformed files
        raise CheckpointError(f"{folder}: its tokenizer files cannot be read: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    _validate_listed_ids(folder, config, tokenizer)
    return tokenizer


def _validate_listed_ids(folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    listed, path = config.get("added_tokens_decoder"), folder / "tokenizer_config.json"
    for number, token in (listed if isinstance(listed, dict) else {}).items():
        content = token.get("content") if isinstance(token, dict) else None
        if not number.isdecimal() or not isinstance(content, str):
            raise CheckpointError(f"{path}: added_tokens_decoder.{number}: allowed: a token id, and its content")
        got = tokenizer.convert_tokens_to_ids(content)
        if got != int(number):
            raise CheckpointError(f"{path}: token '{content}' is listed with id {number}, gets {got}")
