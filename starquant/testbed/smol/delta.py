"""What turns the base into a masked-diffusion model: low-rank factors, norms and the embedding of the mask token.

Shape suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from starquant.errors import CheckpointError
from starquant.testbed.smol.base import sha256_of
from starquant.testbed.smol.cache import MANIFEST
from starquant.testbed.smol.tokenizer import MASK

#: Name of a linear in a delta -> in a block of the checkpoint.
LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "g": "mlp.gate_proj",
    "u": "mlp.up_proj",
    "d": "mlp.down_proj",
}
NORMS = {"n1": "input_layernorm", "n2": "post_attention_layernorm"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what describes a delta: base_sha256, files (name -> SHA-256), merged_sha256, training.

    Raises:
        CheckpointError: it is missing or malformed.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert {*manifest} >= {"base_sha256", "files", "merged_sha256"}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AssertionError):
        raise CheckpointError(f"{path}: not the description of a delta") from None
    return dict(manifest)


def read_delta(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a delta, `delta-0.safetensors` and on; by its manifest, where it has one.

    Names are "{block}.{linear}.A" [R, I], "{block}.{linear}.B" [O, R], "{block}.n1", "{block}.n2", "nf", "mask".

    Raises:
        CheckpointError: a file is missing, cut, or not the manifest's.
    """
    listed = read_manifest(folder)["files"] if (folder / MANIFEST).exists() else {}
    files = [folder / name for name in sorted(listed)] or sorted(folder.glob("delta-*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no delta-0.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if listed and sha256_of(file) != listed[file.name]:
            raise CheckpointError(f"{file}: is damaged or of another delta: its SHA-256 is not that in {MANIFEST}")
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a whole safetensors file ({error})") from None
    return tensors


def merge(base: dict[str, Tensor], delta: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the checkpoint in Dream's names and bfloat16: W + B A, the delta's norms, an embedding for [MASK].

    B A is summed in float64, where it is exact, so that every machine gives the same bits. The head, which the base
    ties to the embedding, stays as it was.

    Args:
        base: from `read_base`; its tensors are replaced one by one, so that there are never two copies.
        delta: from `read_delta`.

    Raises:
        CheckpointError: the delta lacks a tensor, or has one of another shape.
    """
    merged = {}
    blocks = 1 + max(int(name.split(".")[2]) for name in base if name.startswith("model.layers."))
    for block in range(blocks):
        where = f"model.layers.{block}"
        for short, name in LINEARS.items():
            weight_OI = base.pop(f"{where}.{name}.weight")
            a_RI, b_OR = _of(delta, f"{block}.{short}.A"), _of(delta, f"{block}.{short}.B")
            if (len(b_OR), a_RI.shape[1]) != weight_OI.shape or b_OR.shape[1] != len(a_RI):
                raise CheckpointError(f"delta: {block}.{short} does not fit the base's {tuple(weight_OI.shape)}")
            merged[f"{where}.{name}.weight"] = weight_OI + (b_OR.double() @ a_RI.double()).float()
            if short in "qkv":
                merged[f"{where}.{name}.bias"] = torch.zeros(len(weight_OI))
        for short, name in NORMS.items():
            merged[f"{where}.{name}.weight"] = _of(delta, f"{block}.{short}", base.pop(f"{where}.{name}.weight"))
    merged["model.norm.weight"] = _of(delta, "nf", base.pop("model.norm.weight"))
    head_VD = base.pop("model.embed_tokens.weight")
    embedding_VD = head_VD.clone()
    embedding_VD[MASK] = _of(delta, "mask", head_VD[MASK])
    merged |= {"model.embed_tokens.weight": embedding_VD, "lm_head.weight": head_VD}
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in merged.items()}


def _of(delta: dict[str, Tensor], name: str, like: Tensor | None = None) -> Tensor:
    if name not in delta:
        raise CheckpointError(f"delta: lacks {name}")
    if like is not None and delta[name].shape != like.shape:
        raise CheckpointError(f"delta: {name} is {tuple(delta[name].shape)}, the base's {tuple(like.shape)}")
    return delta[name].float()
