"""Numbers of a checkpoint that are none: of its configuration and of its weights, in every place they may stand."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from starquant.diffusion.special_tokens import end_token_ids, eos_token_id, padding_id
from starquant.errors import CheckpointError
from starquant.models import load_model, load_tokenizer
from starquant.models.checkpoint import read_json
from starquant.models.config_values import validate_values
from starquant.models.llada import LLaDAConfig
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.models import edit_config
from tests.support.paths import GOLDEN

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, family: str) -> Path:
    return Path(shutil.copytree(GOLDEN / family, tmp_path / family))


def refuse(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, **options)


NAN, INF = float("nan"), float("inf")
EITHER: list[tuple[dict[str, Any], str]] = [
    ({"rms_norm_eps": NAN}, "rms_norm_eps: got nan"),
    ({"rms_norm_eps": INF}, "rms_norm_eps: got inf"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps: got '0.0', allowed: a number, 1e-12 to 1"),
    ({"rms_norm_eps": None}, "rms_norm_eps: got 'None'"),
    ({"rope_theta": {"a": 1}}, "rope_theta: got \"{'a': 1}\", allowed: a number"),
    ({"rms_norm_eps": 1e30}, "rms_norm_eps: got '1e.30'"),
    ({"rms_norm_eps": True}, "rms_norm_eps: got 'True'"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: got '1e-5'"),
    ({"rope_theta": -1.0}, "rope_theta: got '-1.0'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": NAN}}, "rope_parameters.rope_theta: got nan"),
    ({"somebody_elses": [{"knob": [1.0, INF]}]}, "somebody_elses.0.knob.1: got inf"),
    ({"num_labels": 10**9}, "num_labels: got '1000000000'"),
    ({"rope_parameters": 3}, "not a usable configuration: "),
    ({"vocab_size": 512.0}, "vocab_size: got '512.0', allowed: a whole number"),
    ({"vocab_size": True}, "vocab_size: got 'True'"),
    ({"vocab_size": 10**12}, "vocab_size: got '1000000000000', allowed: a whole number, 1 to"),
    ({"mask_token_id": True}, "mask_token_id: got 'True', allowed: a token id"),
    ({"eos_token_id": False}, "eos_token_id: got 'False', allowed: a token id"),
    ({"eos_token_id": []}, r"eos_token_id: got '\[\]'"),
    ({"eos_token_id": [501, True]}, r"eos_token_id: got '\[501, True\]'"),
    ({"eos_token_id": 99999}, "eos_token_id is 99999; allowed: 0 to"),
    ({"eos_token_id": [501, 99999]}, r"eos_token_id is \[501, 99999\]; allowed: 0 to"),
    ({"bos_token_id": 1.0}, "bos_token_id: got '1.0'"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings: got 'false', allowed: true, false"),
]
LLADA: list[tuple[dict[str, Any], str]] = [
    ({"n_layers": 10**9}, "n_layers: got '1000000000', allowed: a whole number, 1 to"),
    ({"n_layers": 8000}, "it has 8000 blocks, the weight files hold"),
    ({"weight_tying": 1}, "weight_tying: got '1'"),
    ({"d_model": 128.0}, "d_model: got '128.0'"),
    ({"eot_token_id": -1}, "eot_token_id is -1"),
]


@pytest.mark.parametrize(("change", "message"), EITHER, ids=str)
def test_a_number_of_the_configuration_that_is_none(folder: Path, change: dict[str, Any], message: str) -> None:
    edit_config(folder, **change)
    refuse(folder, "config.json: .*" + message)


@pytest.mark.parametrize(("change", "message"), LLADA, ids=str)
def test_a_number_of_lladas_configuration_that_is_none(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = Path(shutil.copytree(GOLDEN / "llada_mha", tmp_path / "m"))
    edit_config(folder, **change)
    refuse(folder, "config.json: .*" + message)


@pytest.mark.parametrize(
    "published", sorted((GOLDEN / "real_configs").glob("*/config.json")), ids=lambda p: p.parent.name
)
def test_published_configurations_pass(published: Path) -> None:
    validate_values(read_json(published))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' is named twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' is named twice"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_json_that_says_two_things_or_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    refuse(tmp_path, message)


def change_weights(folder: Path, name: str, tensor: torch.Tensor) -> str:
    tensors = load_file(folder / WEIGHTS)
    [full] = [key for key in tensors if key.endswith(name)]
    save_file(tensors | {full: tensor.expand_as(tensors[full]).contiguous()}, folder / WEIGHTS, {"format": "pt"})
    return full


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [(NAN, "holds values that are not finite"), (3e38, "holds values of up to 3e.38"), (0.0, "holds zeros only")],
)
def test_a_weight_that_is_none(folder: Path, value: float, message: str, on_disk: bool) -> None:
    name = change_weights(
        folder, "1.up_proj.weight" if "llada" in str(folder) else "1.mlp.up_proj.weight", torch.tensor(value)
    )
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        load_model(folder, blocks_on_disk=on_disk)(torch.tensor([[1, 2]]))


def test_a_weight_that_overflows_in_the_dtype_it_is_computed_in(folder: Path) -> None:
    change_weights(folder, "1.up_proj.weight" if "llada" in str(folder) else "1.mlp.up_proj.weight", torch.tensor(7e4))
    load_model(folder, dtype="bfloat16")
    refuse(folder, "up_proj.weight holds values that are not finite", dtype="float16")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int64, "I64"),
        (torch.int8, "I8"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, r"F8_E4M3 \(float8\)"),
        (torch.float8_e5m2, r"F8_E5M2 \(float8\)"),
    ],
)
def test_a_weight_of_a_dtype_that_is_none(folder: Path, dtype: torch.dtype, name: str) -> None:
    change_weights(folder, "embed_tokens.weight" if "dream" in str(folder) else "wte.weight", torch.ones(()).to(dtype))
    refuse(folder, f"is stored as {name}, allowed: F32, BF16, F16, F64")


@pytest.mark.parametrize("shape", [[-1, -2], [True, 2], [1.0, 2]])
def test_a_shape_that_is_none(folder: Path, shape: list[Any]) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refuse(folder, "dtype, shape and offsets of a do not agree")


def test_a_list_of_ends_ends_by_any_and_none_by_none() -> None:
    several, one, none = (LLaDAConfig(eos_token_id=ids) for ids in ([126081, 7], 126081, None))
    assert end_token_ids(several) == {126081, 7, 126348}
    assert end_token_ids(one) == {126081, 126348}
    assert (eos_token_id(several), padding_id(several), padding_id(none)) == (126081, 126081, 0)
    with pytest.raises(CheckpointError, match="eos_token_id is None; needed: where an answer ends"):
        end_token_ids(none)


def test_a_model_with_several_ends_or_none_loads(folder: Path) -> None:
    edit_config(folder, eos_token_id=[501, 7])
    assert end_token_ids(load_model(folder).config) == {501, 7}
    edit_config(folder, eos_token_id=None)
    load_model(folder)


@pytest.mark.parametrize("mask_id", [2, 5])
def test_a_mask_token_that_is_not_the_tokenizers_is_refused(mask_id: int, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(weights_folder(0), tmp_path / "tiny"))
    edit_config(folder, mask_token_id=mask_id)
    message = rf"config.json: mask_token_id is {mask_id}, .*'\[MASK\]' is 1; allowed: 1"
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


def test_a_mask_token_that_ends_a_text_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(weights_folder(0), tmp_path / "tiny"))
    edit_config(folder, mask_token_id=0)
    with pytest.raises(CheckpointError, match=r"mask_token_id and eos_token_id are both 0; allowed: two tokens"):
        load_model(folder)
