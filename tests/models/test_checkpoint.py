"""Good checkpoint folders load exactly; every kind of bad one is refused with the file or parameter named."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from starquant.errors import CheckpointError, ConfigError
from starquant.models import checkpoint, load_model, validation
from starquant.models.base import MaskedDiffusionModel
from starquant.models.checkpoint import fingerprint
from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.numerics.chunks import row_slices
from tests.support.models import edit_config

IDS = torch.tensor([[3, 60, 60, 7, 1, 60], [0, 63, 5, 60, 60, 60]])
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.transformer.ln_f.weight"


def randomised(model: MaskedDiffusionModel) -> MaskedDiffusionModel:
    """Make every parameter differ from what a fresh model holds, norms and biases too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def llada(**overrides: object) -> MaskedDiffusionModel:
    sizes = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 48}
    return randomised(LLaDAModelLM(LLaDAConfig(**sizes, vocab_size=64, mask_token_id=60, **overrides)))


def dream(**overrides: object) -> MaskedDiffusionModel:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    more = {"intermediate_size": 48, "vocab_size": 64, "mask_token_id": 60}
    return randomised(DreamModel(DreamConfig(**sizes, **more, **overrides)))


@torch.no_grad()
def expect_equal(got: MaskedDiffusionModel, want: MaskedDiffusionModel) -> None:
    state = want.state_dict()
    assert got.state_dict().keys() == state.keys()
    for name, value in got.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
    assert torch.equal(got(IDS).logits, want(IDS).logits)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good LLaDA checkpoint in one file."""
    llada().save_pretrained(tmp_path / "good")
    return tmp_path / "good"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A good LLaDA checkpoint in several files."""
    llada().save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    return tmp_path / "shards"


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object], file: str = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def expect_refusal(folder: Path | str, *named: str, error: type[Exception] = CheckpointError, **options: Any) -> None:
    with pytest.raises(error) as caught:
        load_model(folder, **options)
    for text in named:
        assert text in str(caught.value)


# What loads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [
        llada,
        dream,
        lambda: llada(rope_theta=50.0, rms_norm_eps=0.1),
        lambda: dream(rope_theta=50.0, rms_norm_eps=0.1),
        lambda: llada(weight_tying=True, embedding_size=80),
        lambda: dream(tie_word_embeddings=True),
    ],
    ids=["llada", "dream", "llada numbers", "dream numbers", "llada tied", "dream tied"],
)
def test_round_trip_keeps_weights_and_dtype(
    make: Callable[[], MaskedDiffusionModel], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make().to(dtype)
    model.save_pretrained(tmp_path)
    expect_equal(load_model(tmp_path), model)


@pytest.mark.parametrize("make", [llada, dream])
def test_sharded_checkpoint_equals_the_original(make: Callable[[], MaskedDiffusionModel], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / INDEX).exists() and not (tmp_path / WEIGHTS).exists()
    expect_equal(load_model(tmp_path), model)


def test_stored_dtype_is_kept_when_the_config_names_none(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]  # LLaDA's published config has none
    (folder / "config.json").write_text(json.dumps(config))
    assert {parameter.dtype for parameter in load_model(folder).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_names(dtype: str, folder: Path) -> None:
    model = load_model(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    expect_equal(model, load_model(folder).to(getattr(torch, dtype)))


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map_gives_the_same_model(device_map: str | dict[str, str], folder: Path) -> None:
    pytest.importorskip("accelerate")
    if torch.cuda.is_available():
        device_map = {"": "cpu"}
    expect_equal(load_model(folder, device_map=device_map), load_model(folder, device="cpu"))


def test_python_files_of_a_checkpoint_never_run(folder: Path) -> None:
    for name in ("configuration_llada", "modeling_llada"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nraise SystemExit('ran')\n")
    classes = {"AutoModel": "modeling_llada.LLaDAModelLM", "AutoModelForMaskedLM": "modeling_llada.LLaDAModelLM"}
    edit_config(folder, auto_map={"AutoConfig": "configuration_llada.LLaDAConfig", **classes})
    assert type(load_model(folder)) is type(AutoModel.from_pretrained(folder)) is LLaDAModelLM
    assert not (folder / "ran").exists()


# Folder and hub


def test_missing_folder(tmp_path: Path) -> None:
    expect_refusal(tmp_path / "absent", str(tmp_path / "absent"))
    expect_refusal(str(tmp_path / "absent"), str(tmp_path / "absent"))


def test_file_instead_of_folder(folder: Path) -> None:
    expect_refusal(folder / WEIGHTS, str(folder / WEIGHTS), "is a file")


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    expect_refusal("some-owner/some-model", "some-owner/some-model", "no connection", "model.path")


def test_hub_id_is_fetched_at_its_revision_without_code_or_pickles(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    asked: dict[str, Any] = {}

    def fetch(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(id=repo_id, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    expect_equal(load_model("some-owner/some-model", revision="abc"), load_model(folder))
    assert (asked["id"], asked["revision"]) == ("some-owner/some-model", "abc")
    wanted = ("config.json", WEIGHTS, INDEX, "tokenizer.json", "vocab.json", "merges.txt")
    unwanted = ("modeling_llada.py", "pytorch_model.bin", "model.pt", "model.pkl")
    assert all(any(Path(name).match(pattern) for pattern in asked["patterns"]) for name in wanted)
    assert not any(Path(name).match(pattern) for pattern in asked["patterns"] for name in unwanted)


# config.json


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    expect_refusal(folder, str(folder / "config.json"))


@pytest.mark.parametrize("content", [b"", b"{'model_type': 'llada'}", b"[]", b'"llada"', b"\xff\xfe\x00", b'{"a": 1'])
def test_config_that_is_no_json_object(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    expect_refusal(folder, str(folder / "config.json"), "JSON")


@pytest.mark.parametrize("model_type", ["llama", "dream", "LLaDA", "", None])
def test_another_architecture(model_type: str | None, folder: Path) -> None:
    edit_config(folder, model_type=model_type)
    expect_refusal(folder, str(folder / "config.json"), f"model_type is {model_type!r}", "Dream, llada")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", True),
        ("rope", False),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("attention_layer_norm", True),
        ("input_emb_norm", True),
        ("scale_logits", True),
        ("layer_norm_type", "default"),
        ("layer_norm_with_affine", False),
        ("block_type", "sequential"),
        ("activation_type", "gelu"),
        ("d_model", 30),
        ("n_kv_heads", 3),
    ],
)
def test_unsupported_llada_config(key: str, value: object, folder: Path) -> None:
    edit_config(folder, **{key: value})
    expect_refusal(folder, str(folder / "config.json"), f"{key}={value!r}")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling={'type': 'linear'"),
        ("hidden_act", "gelu", "hidden_act='gelu'"),
        ("use_sliding_window", True, "use_sliding_window=true"),
        ("hidden_size", 30, "hidden_size=30"),
        ("num_key_value_heads", 3, "num_key_value_heads=3"),
    ],
)
def test_unsupported_dream_config(key: str, value: object, named: str, tmp_path: Path) -> None:
    dream().save_pretrained(tmp_path)
    edit_config(tmp_path, **{key: value})
    expect_refusal(tmp_path, str(tmp_path / "config.json"), named)


# Weight files


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    expect_refusal(folder, str(folder), WEIGHTS)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_unread(name: str, folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / name)
    (folder / WEIGHTS).unlink()
    expect_refusal(folder, str(folder), name, "only safetensors")


@pytest.mark.parametrize("removed", [1, 100, 0.5, "all but 100", "all but 8", "all but 7"])
def test_truncated_weights(removed: float | str, folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    if isinstance(removed, str):
        kept = int(removed.split()[-1])
    else:
        kept = int(len(content) * removed) if removed < 1 else len(content) - int(removed)
    (folder / WEIGHTS).write_bytes(content[:kept])
    expect_refusal(folder, str(folder / WEIGHTS), ": truncated")


def test_weights_with_bytes_after_the_end(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"\0\0")
    expect_refusal(folder, str(folder / WEIGHTS), "damaged")


def test_zero_byte_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")
    expect_refusal(folder, str(folder / WEIGHTS), "0 bytes")


@pytest.mark.parametrize(
    "content",
    [
        bytes(range(256)) * 50,
        (40).to_bytes(8, "little") + b"not json" * 100,
        (40).to_bytes(8, "little") + b"\xfa" * 800,
        (14).to_bytes(8, "little") + b'{"a": {"b": 1}}',
        (0).to_bytes(8, "little") + b"\0" * 100,
    ],
    ids=["bytes", "text", "not utf-8", "no offsets", "empty header"],
)
def test_garbage_weights(content: bytes, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(content)
    expect_refusal(folder, str(folder / WEIGHTS), "not a safetensors file")


# Shards


def test_missing_shards(shards: Path) -> None:
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    (shards / names[1]).unlink()
    (shards / names[2]).unlink()
    expect_refusal(shards, str(shards), f"2 of {len(names)} shards", names[1], names[2])


def test_truncated_shard(shards: Path) -> None:
    victim = sorted(shards.glob("*.safetensors"))[2]
    victim.write_bytes(victim.read_bytes()[:-4])
    expect_refusal(shards, str(victim), ": truncated")


def test_index_naming_a_parameter_its_shard_lacks(shards: Path) -> None:
    owner = json.loads((shards / INDEX).read_text())["weight_map"]
    edit_weights(shards, lambda tensors: tensors.pop(NORM), file=owner[NORM])
    expect_refusal(shards, str(shards / INDEX), owner[NORM], NORM)


def test_index_naming_the_wrong_shard(shards: Path) -> None:
    owner = json.loads((shards / INDEX).read_text())["weight_map"]
    wrong = next(name for name in owner.values() if name != owner[NORM])
    edit_index(shards, lambda weight_map: weight_map.update({NORM: wrong}))
    expect_refusal(shards, INDEX, wrong, NORM)


def test_index_without_a_parameter(shards: Path) -> None:
    edit_index(shards, lambda weight_map: weight_map.pop(NORM))
    expect_refusal(shards, NORM, "gives to no file")


@pytest.mark.parametrize("pattern", ["../good/{}", "{}", "sub/model.safetensors", "pytorch_model.bin", ".."])
def test_index_cannot_point_out_of_the_folder(pattern: str, folder: Path, shards: Path) -> None:
    name = pattern.format(folder / WEIGHTS if pattern == "{}" else WEIGHTS)
    edit_index(shards, lambda weight_map: weight_map.update({NORM: name}))
    expect_refusal(shards, str(shards / INDEX), f"'{name}'")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map"', "[]"])
def test_index_that_is_none(content: str, shards: Path) -> None:
    (shards / INDEX).write_text(content)
    expect_refusal(shards, str(shards / INDEX))


# Parameters


def test_missing_parameter(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(NORM))
    expect_refusal(folder, str(folder), "1 parameters are missing", NORM)


def test_unexpected_parameter(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update(stowaway=torch.zeros(3)))
    expect_refusal(folder, str(folder), "1 parameters are unexpected", "stowaway")


def test_misshapen_parameter(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({NORM: torch.ones(33)}))
    expect_refusal(folder, str(folder), "1 parameters are misshapen", NORM, "[33]", "[32]")


def test_all_differences_are_reported_at_once(folder: Path) -> None:
    head = "model.transformer.ff_out.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["stowaway"] = tensors.pop(NORM)
        tensors[head] = tensors[head].T.contiguous()

    edit_weights(folder, spoil)
    expect_refusal(folder, NORM, "missing", "stowaway", "unexpected", head, "misshapen", "[32, 64]", "[64, 32]")


def test_config_of_other_sizes(folder: Path) -> None:
    edit_config(folder, n_layers=3)
    expect_refusal(folder, "9 parameters are missing", "model.transformer.blocks.2.attn_norm.weight")


def test_a_tied_llada_has_no_place_for_a_head(folder: Path) -> None:
    edit_config(folder, weight_tying=True)
    expect_refusal(folder, "unexpected", "model.transformer.ff_out.weight")


def test_only_a_tied_dream_may_lack_its_head(tmp_path: Path) -> None:
    dream(tie_word_embeddings=True).save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    expect_refusal(tmp_path, "missing", "lm_head.weight")


# Arguments


def test_unknown_dtype(folder: Path) -> None:
    allowed = "float32, bfloat16, float16"
    expect_refusal(folder, "'bfloat61'", allowed, "'bfloat16'?", error=ConfigError, dtype="bfloat61")


@pytest.mark.parametrize("device", ["abacus", "cuda:99", ""])
def test_unknown_device(device: str, folder: Path) -> None:
    expect_refusal(folder, "runtime.device", f"'{device}'", error=ConfigError, device=device)


def test_device_and_device_map(folder: Path) -> None:
    expect_refusal(folder, "device or device_map", error=ConfigError, device="cpu", device_map="auto")


# Fingerprint


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_fingerprint_of_a_copy(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    original = request.getfixturevalue(kind)
    shutil.copytree(original, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(original)
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(original))


def test_fingerprint_sees_one_changed_number_of_any_parameter(folder: Path) -> None:
    seen = {fingerprint(folder)}
    original = load_file(folder / WEIGHTS)
    for name, value in original.items():
        changed = value.clone()
        changed.flatten()[-1] += 1e-3
        save_file(original | {name: changed}, folder / WEIGHTS, metadata={"format": "pt"})
        seen.add(fingerprint(folder))
    assert len(seen) == 1 + len(original)


def test_fingerprint_sees_a_change_in_any_shard(shards: Path) -> None:
    seen = {fingerprint(shards)}
    files = sorted(shards.glob("*.safetensors"))
    for file in files:
        edit_weights(shards, lambda tensors: next(iter(tensors.values())).mul_(2), file=file.name)
        seen.add(fingerprint(shards))
    assert len(seen) == 1 + len(files)


def test_fingerprint_sees_one_bit_of_a_large_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = fingerprint(folder)
    monkeypatch.setattr(checkpoint, "LARGE", (folder / WEIGHTS).stat().st_size - 1)
    before = fingerprint(folder)
    assert before == fingerprint(folder) != small
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert fingerprint(folder) != before


def test_fingerprint_sees_the_config(folder: Path) -> None:
    before = fingerprint(folder)
    edit_config(folder, rope_theta=10000.0)
    assert fingerprint(folder) != before


def test_fingerprint_refuses_a_bad_folder(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=re.escape(str(folder / WEIGHTS))):
        fingerprint(folder)


def test_every_number_of_a_model_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "row_slices", functools.partial(row_slices, numbers=5))
    model = torch.nn.Linear(4, 3)
    validation.validate_finite(model)
    with torch.no_grad():
        model.weight[2, 3] = torch.nan
    with pytest.raises(CheckpointError, match=r"^here: weight holds values that are not finite$"):
        validation.validate_finite(model, "here: ")
