"""Tokenizers as keys of a GGUF: how text is cut is named as llama.cpp does, or refused."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from starquant.errors import ConfigError
from starquant.llama_cpp.tokenizer import CONTROL, NORMAL, PATTERNS, UNUSED, USER_DEFINED, vocabulary_of
from starquant.models import load_tokenizer
from starquant.testbed.tiny.shipped import weights_folder


def _bpe(cuts: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: index for index, letter in enumerate(alphabet)} | {"th": 256, "the": 257}
    tokenizer = Tokenizer(models.BPE(words, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = cuts, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|mask|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _split(pattern: str) -> Any:
    by_pattern = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([by_pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def test_ids_types_and_merges() -> None:
    got = vocabulary_of(_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)), 264)
    assert (got.model, got.pre, len(got.tokens)) == ("gpt2", "gpt-2", 264)
    assert got.tokens[256:262] == ("th", "the", "<|mask|>", "<tool>", "[PAD260]", "[PAD261]")
    assert got.types[256:261] == (NORMAL, NORMAL, CONTROL, USER_DEFINED, UNUSED)
    assert got.merges == ("t h", "th e")


def test_ways_of_cutting_text_have_llama_cpps_names() -> None:
    for pattern, name in PATTERNS.items():
        assert vocabulary_of(_bpe(_split(pattern)), 264).pre == name
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    assert vocabulary_of(_bpe(pre_tokenizers.Sequence(digits)), 264).pre == "smollm"


def test_a_way_without_a_name_and_too_many_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cuts text by Split, ByteLevel .*allowed: what it calls smollm, gpt-2"):
        vocabulary_of(_bpe(_split(r"\w+")), 264)
    with pytest.raises(ConfigError, match="a tokenizer of 260 tokens for 200 rows"):
        vocabulary_of(_bpe(pre_tokenizers.ByteLevel()), 200)


def test_a_tokenizer_of_whole_words_is_none() -> None:
    assert vocabulary_of(load_tokenizer(weights_folder(0)), 384).model == "none"
