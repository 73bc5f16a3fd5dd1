"""Checkpoints that are wrong in ways that once loaded silently, or failed without naming the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from starquant.errors import CheckpointError, ConfigError
from starquant.models import load_model, load_tokenizer
from starquant.models.dream import DreamConfig, DreamModel
from tests.support.models import edit_config
from tests.support.paths import GOLDEN


@pytest.fixture
def folder(tmp_path: Path, family: str) -> Path:
    return Path(shutil.copytree(GOLDEN / family, tmp_path / family))


def refuse(folder: Path, *texts: str, error: type[Exception] = CheckpointError, **options: Any) -> None:
    with pytest.raises(error) as caught:
        load_model(folder, **options)
    for text in texts:
        assert text in str(caught.value)


def test_index_beside_a_single_file(folder: Path) -> None:
    load_model(folder).save_pretrained(folder / "shards", max_shard_size="500KB")
    shutil.copy(folder / "model.safetensors", folder / "shards")
    refuse(folder / "shards", "holds both model.safetensors and model.safetensors.index.json")


def test_tensor_in_a_shard_that_does_not_own_it(folder: Path) -> None:
    load_model(folder).save_pretrained(folder / "shards", max_shard_size="500KB")
    last = sorted((folder / "shards").glob("*.safetensors"))[-1]
    save_file(load_file(last) | {"stray.weight": torch.ones(3)}, last, metadata={"format": "pt"})
    refuse(folder / "shards", last.name, "stray.weight", "gives to no file")


@pytest.mark.parametrize("value", [5, None, ["a"]])
def test_index_with_values_that_are_no_names(folder: Path, value: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": value}}))
    refuse(folder, "index.json", "must give a file name")


@pytest.mark.parametrize(
    "header",
    [b"[]", b"3", b'"x"', b"null", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}'],
)
def test_headers_that_are_no_headers(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refuse(folder, "model.safetensors")


def test_header_that_lies_about_a_dtype(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F64"', 1))
    refuse(folder, "model.safetensors", "dtype, shape and offsets of")


def test_deeply_nested_json(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)
    refuse(folder, "config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_folder_where_a_file_should_be(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    refuse(folder, name)


LLADA_BAD = [
    {"n_heads": 0},
    {"n_kv_heads": 0},
    {"n_layers": "3"},
    {"d_model": -128},
    {"rope_theta": "x"},
    {"mask_token_id": 9999},
    {"mask_token_id": None},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"clip_qkv": 0.01},
    {"multi_query_attention": True, "n_kv_heads": 4},
    {"vocab_size": None, "embedding_size": None},
]
DREAM_BAD = [
    {"num_attention_heads": 0},
    {"num_key_value_heads": 0},
    {"mask_token_id": "a"},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}},
]


@pytest.mark.parametrize(
    ("name", "change"), [("llada_mha", c) for c in LLADA_BAD] + [("dream_gqa", c) for c in DREAM_BAD], ids=str
)
def test_configurations_that_make_no_model(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    edit_config(folder, **change)
    refuse(folder, "config.json")


def test_dream_takes_either_spelling_of_the_rotary_base() -> None:
    assert DreamConfig(rope_parameters={"rope_type": "default", "rope_theta": 5.0}).rope_theta == 5.0


def test_stored_dtype_is_kept_whatever_the_config_says(folder: Path) -> None:
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, torch_dtype="float32")
    assert load_model(folder).dtype == torch.bfloat16


def test_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = DreamModel(DreamConfig(**sizes, vocab_size=64, mask_token_id=3, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, file, metadata={"format": "pt"})
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    save_file(tensors | {"lm_head.weight": embedding + 1}, file, metadata={"format": "pt"})
    refuse(tmp_path, "lm_head.weight is stored and differs")


def test_arguments(folder: Path) -> None:
    refuse(folder, "device_map: got 'nonsense'", error=ConfigError, device_map="nonsense")
    refuse(folder, "model.dtype: got 'int8'", error=ConfigError, dtype=torch.int8)
    refuse(folder, "'meta'", error=ConfigError, device="meta")
    with pytest.raises(CheckpointError, match="empty path"):
        load_model("")


@pytest.mark.parametrize("text", ["{", "{}"])
def test_malformed_tokenizer(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="tokenizer files cannot be read"):
        load_tokenizer(tmp_path)
