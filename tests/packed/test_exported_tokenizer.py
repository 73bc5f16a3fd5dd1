"""The tokenizer of an exported folder: AutoTokenizer reads it without code of its own, template and ids are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from starquant.errors import CheckpointError
from starquant.models import load_tokenizer
from starquant.packed.export import _copy_tokenizer
from tests.support.paths import GOLDEN

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXTS = ["Hello world 123", "naïve café\n\n  x = y**2", "<|im_start|>user\nhi<|im_end|> <|mask|>"]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(20 * TEXTS, trainer)
    return tokenizer


@pytest.fixture(params=["vocabulary and merges", "one file"])
def source(request: pytest.FixtureRequest, trained: Tokenizer, tmp_path: Path) -> Path:
    """Files as Dream ships them (a Python class over a BPE), or as LLaDA does, with a template."""
    folder, first = tmp_path / "source", trained.get_vocab_size()
    folder.mkdir()
    config = {"bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    if request.param == "one file":
        whole = Tokenizer.from_str(trained.to_str())
        whole.add_special_tokens(SPECIAL)
        whole.save(str(folder / "tokenizer.json"))
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        trained.model.save(str(folder))
        added = {str(first + i): {"content": token, "special": True} for i, token in enumerate(SPECIAL)}
        code = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
        config |= {"tokenizer_class": "DreamTokenizer", "auto_map": code, "added_tokens_decoder": added}
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_autotokenizer_reads_what_was_exported(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    _copy_tokenizer(source, target)
    config = json.loads((GOLDEN / "dream_gqa" / "config.json").read_text())
    config["mask_token_id"] = load_tokenizer(source).mask_token_id
    (target / "config.json").write_text(json.dumps(config))
    assert "auto_map" not in json.loads((target / "tokenizer_config.json").read_text())
    assert (target / "chat_template.jinja").read_text() == TEMPLATE
    original = load_tokenizer(source)
    for tokenizer in (AutoTokenizer.from_pretrained(target), load_tokenizer(target)):
        assert [tokenizer(text)["input_ids"] for text in TEXTS] == [original(text)["input_ids"] for text in TEXTS]
        assert tokenizer.chat_template == original.chat_template == TEMPLATE
        for token in ("bos_token_id", "eos_token_id", "mask_token_id"):
            assert getattr(tokenizer, token) == getattr(original, token) is not None


def test_a_folder_without_a_tokenizer_exports_none(tmp_path: Path) -> None:
    _copy_tokenizer(GOLDEN / "dream_gqa", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ids_beyond_the_embedding_are_refused(source: Path) -> None:
    config = json.loads((GOLDEN / "dream_gqa" / "config.json").read_text())
    config["mask_token_id"] = load_tokenizer(source).mask_token_id
    highest = max(load_tokenizer(source).get_vocab().values())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": highest + 1}))
    load_tokenizer(source)
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": highest}))
    with pytest.raises(CheckpointError, match=f"ids up to {highest}, but the embedding has {highest} rows"):
        load_tokenizer(source)


@pytest.mark.parametrize("longest", ["x", True, -1, float("nan"), [5]])
def test_a_longest_text_that_is_no_length(source: Path, longest: object) -> None:
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": longest}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: model_max_length: got"):
        load_tokenizer(source)


@pytest.mark.parametrize("listed", [{"5": "token"}, {"x": {"content": "a"}}, {"5": {"content": 3}}, {"5": {}}])
def test_listed_tokens_that_are_none(source: Path, listed: dict[str, object]) -> None:
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": listed}))
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(source)
