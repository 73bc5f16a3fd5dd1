"""GGUF files against `gguf`'s own reader and dequantizer: every tensor, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from starquant.errors import ConfigError
from starquant.llama_cpp.architecture import linear_tensor
from starquant.llama_cpp.writing import write_gguf
from starquant.models import load_tokenizer
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Role, Site
from starquant.numerics import dequantize
from starquant.quantized import HadamardTransform
from starquant.quantized.install import install
from starquant.quantized.packed_linear import Packed
from starquant.quantized.tables import is_tied
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.llama import KINDS, bits_of_blocks, block_model, write
from tests.support.models import fresh
from tests.support.specs import spec

gguf = pytest.importorskip("gguf")


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


def _turned_back(model: MaskedDiffusionModel, role: Role, rows: torch.Tensor) -> torch.Tensor:
    """Undo the published converter's permutation of q and k, by its own formula read backwards."""
    if role not in (Role.Q, Role.K) or model.config.model_type != "llada":
        return rows
    heads = len(rows) // model.block_sites(model.trunk().blocks[0]).attention.head_dim
    return rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _values(module: Any) -> torch.Tensor:
    return dequantize(module.quantized()) if isinstance(module, Packed) else module.weight.detach().float()


@pytest.mark.parametrize("bits", ["q4_0", "q8_0", "w16a16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_reads_back_bit_for_bit(kind: str, bits: str, tmp_path: Path) -> None:
    model = block_model(kind)
    install(model, bits_of_blocks(bits, kind), packed=True)
    read = _tensors(write(model, tmp_path / "m.gguf"))
    trunk = model.trunk()
    expected = {"token_embd.weight": _values(trunk.embedding), "output_norm.weight": trunk.norm.weight.detach()}
    if not is_tied(model):
        expected["output.weight"] = _values(trunk.head)
    for index, block in enumerate(trunk.blocks):
        sites = model.block_sites(block)
        expected[f"blk.{index}.attn_norm.weight"] = sites.norms[Site.QKV].weight.detach()  # type: ignore[assignment]
        expected[f"blk.{index}.ffn_norm.weight"] = sites.norms[Site.GATE_UP].weight.detach()  # type: ignore[assignment]
        for role, linear in sites.linears.items():
            assert isinstance(role, Role)
            name = linear_tensor(index, role)
            read[f"{name}.weight"] = _turned_back(model, role, read[f"{name}.weight"])
            expected[f"{name}.weight"] = _values(linear)
            if linear.bias is not None:
                read[f"{name}.bias"] = _turned_back(model, role, read[f"{name}.bias"])
                expected[f"{name}.bias"] = linear.bias.detach()
    assert read.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(read[name], values), name


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_what_is_not_quantized_is_in_the_type_that_was_chosen(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = block_model("dream_gqa")
    read = _tensors(write(model, tmp_path / "m.gguf", kind))
    down = model.block_sites(model.trunk().blocks[1]).linears[Role.DOWN].weight.detach()
    assert torch.equal(read["blk.1.ffn_down.weight"], down.to(dtype).float())
    assert torch.equal(read["output_norm.weight"], model.trunk().norm.weight.detach())  # type: ignore[arg-type]


def test_the_keys_say_what_the_model_is(tmp_path: Path) -> None:
    for kind, architecture, shift in (("llada_mha", "llada", False), ("dream_gqa", "dream", True)):
        model = block_model(kind)
        fields = gguf.GGUFReader(write(model, tmp_path / f"{kind}.gguf")).fields
        said = {name: field.contents() for name, field in fields.items()}
        assert said["general.architecture"] == architecture
        assert said["diffusion.shift_logits"] is shift
        assert said[f"{architecture}.attention.causal"] is False
        assert said["tokenizer.ggml.mask_token_id"] == 199
        assert said["tokenizer.ggml.eos_token_id"] == 198
        assert said[f"{architecture}.attention.head_count_kv"] == (2 if kind == "dream_gqa" else 3)
        assert said[f"{architecture}.feed_forward_length"] == 160


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    for name in (".m.gguf.unfinished-x1", ".m.gguf.mine", ".other.gguf.unfinished-x1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").write_text("x")
    write(block_model("llada_mha"), tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.gguf.mine", ".other.gguf.unfinished-x1", "m.gguf"]


def test_what_a_gguf_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    target, tokenizer = tmp_path / "m.gguf", load_tokenizer(weights_folder(0))
    rotated = block_model("llada_mha")
    rotated.block_sites(rotated.trunk().blocks[1]).inputs[Site.DOWN].transform = HadamardTransform(160)
    with pytest.raises(ConfigError, match=r"blocks.1.down_input has one \(hadamard 160\); allowed: method=rtn, gptq"):
        write_gguf(rotated, tokenizer, target)
    per_token = block_model("llada_mha")
    install(per_token, spec("bits=w4a8", "bits.grid=common").bits, packed=True)
    with pytest.raises(ConfigError, match=r"qkv_input rounds on another grid than llama.cpp.*allowed: bits=q4_0"):
        write_gguf(per_token, tokenizer, target)
    weights_only = block_model("llada_mha")
    install(weights_only, spec("bits=w4a16", "bits.grid=common").bits, packed=True)
    with pytest.raises(ConfigError, match=r"no type for blk.0.attn_q.weight's grid; allowed: bits=q4_0, q8_0"):
        write_gguf(weights_only, tokenizer, target)
    operands = block_model("llada_mha")
    install(operands, spec("bits=q4_0", "bits.attention.k=8").bits, packed=True)
    with pytest.raises(ConfigError, match="has quantized operands"):
        write_gguf(operands, tokenizer, target)
    values = block_model("llada_mha")
    install(values, spec("bits=q4_0").bits)
    with pytest.raises(ValueError, match="packed=True"):
        write_gguf(values, tokenizer, target)
    with pytest.raises(ConfigError, match=r"m\.gguf: cannot be written"):
        write_gguf(block_model("llada_mha"), tokenizer, tmp_path / "nowhere" / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_width_that_is_no_whole_number_of_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"blocks of 32 do not divide the 296 inputs of model.layers.0.mlp.down_proj"):
        install(fresh("dream_gqa").float(), spec("bits=q4_0").bits)
