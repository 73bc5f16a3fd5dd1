"""The embedded model's word-level tokenizer, built from the generators' own vocabulary."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from starquant.testbed.tiny import arithmetic, programs, world

EOS, MASK, UNKNOWN = "<eos>", "[MASK]", "<unk>"


def vocabulary() -> dict[str, int]:
    """Return word -> id: the special tokens, the numbers 0 to 99, then every word of the generators."""
    words = [EOS, MASK, UNKNOWN, *map(str, range(100))]
    words += [*world.WORDS, *arithmetic.WORDS, *programs.WORDS]
    words += [
        *world.PEOPLE,
        *world.RELATIONS,
        *(word for attributes in world.RELATIONS.values() for word in attributes),
    ]
    words += arithmetic.THINGS
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer; words it does not know become <unk>."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
