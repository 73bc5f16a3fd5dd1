"""The base's tokenizer, out of its GGUF: byte-level BPE whose pre-tokenizer the file only names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from starquant.testbed.smol.base import open_gguf

BOS, EOS, MASK, UNKNOWN = 1, 2, 3, 0
_CONTROL = 3  # GGUF's type of special tokens
SPLITS_DIGITS = "smollm"  # what the GGUF calls the pre-tokenizer built here


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer; raises as `base.read_base`."""
    reader = open_gguf(path)

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.ggml.{name}"].contents()

    assert field("pre") == SPLITS_DIGITS
    words, merges = field("tokens"), [tuple(merge.split(" ")) for merge in field("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, field("token_type"), strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the files of a checkpoint folder that transformers reads a tokenizer from, name -> text."""
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "mask_token": MASK, "unk_token": UNKNOWN}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        **{name: tokenizer.id_to_token(number) for name, number in named.items()},
    }
    whole = json.loads(tokenizer.to_str())
    return {
        "tokenizer.json": json.dumps(whole, ensure_ascii=False, separators=(",", ":")) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=1) + "\n",
    }
