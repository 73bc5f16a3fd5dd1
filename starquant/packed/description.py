"""What was put into a model, as plain data, and back: modules without their tensors.

Tensors are the modules' buffers and travel under their names. `describe(model)` and `rebuild(model, described)` are
inverse to each other; nothing of how a method arrived at them is needed to rebuild them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from starquant.errors import CheckpointError
from starquant.kernels import sums_fit
from starquant.models.base import MaskedDiffusionModel
from starquant.models.layers import AttentionCore, Heads, InputSite, RotaryAttention
from starquant.models.roles import ExpertRole, Site
from starquant.numerics import PerChannel, PerGroup, PerToken, QuantFormat, States, TokenState
from starquant.packed.transform_data import (
    Data,
    Place,
    fields,
    flag,
    make_transform,
    transform_data,
    validate_keys,
    whole,
)
from starquant.quantized.activation_quantizer import ActivationQuantizer, Where
from starquant.quantized.attention import CLIPPED, COMMON, OPERANDS, KeyValueGrid, QuantizedAttentionCore
from starquant.quantized.fused_heads import FusedHeads
from starquant.quantized.packed_linear import Packed, PackedEmbedding, PackedLinear

#: What a site says that clips the largest and the smallest number at ratios of their own.
BOTH_ENDS = "ends"


def describe(model: MaskedDiffusionModel) -> Data:
    """Return every module that a method has put in, by name; of blocks on disk what was said of them when written."""
    described = describe_part(model, "")
    for part in {} if model.stored_blocks is None else model.stored_blocks.parts.values():
        described |= part.said()
    return described


def describe_part(part: nn.Module, prefix: str) -> Data:
    """Return every module of a part of a model that a method has put in; `prefix` is the part's own name."""
    described: Data = {}
    for own_name, module in part.named_modules():
        name = f"{prefix}.{own_name}" if prefix else own_name
        if isinstance(module, PackedLinear):
            described[name] = {"kind": "packed_linear", **_grid(module), "bias": module.bias is not None}
        elif isinstance(module, PackedEmbedding):
            described[name] = {"kind": "packed_embedding", **_grid(module)}
        elif isinstance(module, ActivationQuantizer) or (
            isinstance(module, InputSite) and module.transform is not None
        ):
            clip, transform = _clip_data(module.state_clip), transform_data(module.transform)
            described[name] = {"kind": "site", "grid": _token_grid(module), "state_clip": clip, "transform": transform}
        elif isinstance(module, QuantizedAttentionCore):
            shape = None if module.v_scale_KE is None else list(module.v_scale_KE.shape)
            described[name] = {
                "kind": "attention",
                "bits": {operand: module.formats[operand].bits for operand in OPERANDS},
                "qk_transform": transform_data(module.qk_transform),
                "v_transform": transform_data(module.v_transform),
                "v_scale": shape,
                **({} if module.clip_OE is None else {"clips": True}),
            }
            if module.kv != COMMON:
                described[name]["kv"] = asdict(module.kv)
            if module.kv_at != "read":
                described[name]["kv_at"] = module.kv_at
    return described


def _clip_data(clip: Tensor | None) -> bool | str:
    """Return false for no clip ratios, true for one a token state, "ends" for one of each end."""
    return BOTH_ENDS if clip is not None and clip.dim() == 2 else clip is not None


def _grid(module: Packed) -> Data:
    fmt = module.weight_format
    size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else None
    return {"bits": fmt.bits, "symmetric": fmt.symmetric, "group_size": size}


def _token_grid(site: InputSite) -> Data | None:
    if not isinstance(site, ActivationQuantizer):
        return None
    return {"bits": site.format.bits, "symmetric": site.format.symmetric, "clip_ratio": site.format.clip_ratio}


def rebuild(model: MaskedDiffusionModel, described: Data) -> None:
    """Put described modules into a model as its configuration makes it; their buffers are on its device, unset.

    Raises:
        CheckpointError: modules that the model does not have, that do not fit it, or that are not described as
            `describe` does.
    """
    modules = dict(model.named_modules())
    inputs = _inputs(model)
    for name, data in described.items():
        if name not in modules:
            raise CheckpointError(f"quantization_config.modules: {name}: the model has no such module")
        try:
            model.set_submodule(name, _module(fields(data), name, modules, inputs))
        except (ValueError, CheckpointError) as error:
            raise CheckpointError(f"quantization_config.modules: {name}: {error}") from None
    model.quantized = True


def _inputs(model: MaskedDiffusionModel) -> dict[str, Place]:
    """Return where every input site stands: its channels, and the head width of those behind an attention."""
    inputs: dict[str, Place] = {}
    for info in model.linears().values():
        attention = model.block_sites(model.trunk().blocks[info.block]).attention
        head_dim = attention.head_dim if info.role.site is Site.OUT else None
        inputs[info.site] = Place(info.module.in_features, head_dim, len(model.states))
    return inputs


def _module(data: Data, name: str, modules: dict[str, nn.Module], inputs: dict[str, Place]) -> nn.Module:
    original = modules[name]
    if data["kind"] == "packed_linear" and isinstance(original, nn.Linear):
        validate_keys(data, ("bits", "symmetric", "group_size", "bias"))
        dtype = original.weight.dtype if flag(data, "bias") else None
        return PackedLinear(
            original.in_features, original.out_features, _weight_format(data, original.in_features), dtype
        )
    if data["kind"] == "packed_embedding" and isinstance(original, nn.Embedding):
        validate_keys(data, ("bits", "symmetric", "group_size"))
        fmt = _weight_format(data, original.embedding_dim)
        return PackedEmbedding(original.num_embeddings, original.embedding_dim, fmt, original.weight.dtype)
    if data["kind"] == "site" and isinstance(original, InputSite):
        return _site(data, inputs[name])
    if data["kind"] == "attention" and isinstance(original, AttentionCore):
        attention = modules[name.rpartition(".")[0]]
        assert isinstance(attention, RotaryAttention)
        model = modules[""]
        assert isinstance(model, MaskedDiffusionModel)
        return _attention(data, attention, model.states)
    raise ValueError(f"got kind {data['kind'][:40]!r} for {type(original).__name__}")


def _weight_format(data: Data, columns: int) -> QuantFormat:
    bits, size = whole(data, "bits", 2, 8), data["group_size"]
    if size is not None and columns % whole(data, "group_size", 1, columns):
        raise ValueError(f"group_size {size} does not divide {columns} inputs")
    return QuantFormat(bits, flag(data, "symmetric"), PerChannel() if size is None else PerGroup(size))


def _site(data: Data, place: Place) -> InputSite:
    validate_keys(data, ("grid", "state_clip", "transform"))
    clip = None
    if data["state_clip"] == BOTH_ENDS or flag(data, "state_clip"):
        shape = (place.states, 2) if data["state_clip"] == BOTH_ENDS else (place.states,)
        clip = torch.empty(shape, dtype=torch.float32)
    transform = make_transform(data["transform"], place)
    grid = data["grid"]
    if grid is None:
        return InputSite(transform, clip)
    if not isinstance(grid, dict):
        raise ValueError(f"grid: got {str(grid)[:60]}, allowed: an object, null")
    validate_keys({"kind": "grid", **grid}, ("bits", "symmetric", "clip_ratio"))
    ratio = _ratio(grid)
    bits = 16 if grid["bits"] == 16 else whole(grid, "bits", 2, 8)
    return ActivationQuantizer(QuantFormat(bits, flag(grid, "symmetric"), PerToken(), ratio), transform, clip)


def _ratio(grid: Data) -> float:
    ratio = grid["clip_ratio"]
    if type(ratio) not in (int, float) or not 0.0 < ratio <= 1.0:
        raise ValueError(f"clip_ratio: got {str(ratio)[:20]}, allowed: above 0, at most 1")
    return float(ratio)


def _key_value_grid(data: Data) -> KeyValueGrid:
    grid = data.get("kv")
    if grid is None:
        return COMMON
    if not isinstance(grid, dict):
        raise ValueError(f"kv: got {str(grid)[:60]}, allowed: an object, null")
    validate_keys({"kind": "kv", **grid}, ("symmetric", "clip_ratio"))
    return KeyValueGrid(flag(grid, "symmetric"), _ratio(grid))


def _kv_at(data: Data, states: States) -> str:
    """Return when keys and values are rounded; at commit only where the model has finished blocks."""
    when, allowed = data.get("kv_at", "read"), ("read", "commit") if TokenState.CONTEXT in states else ("read",)
    if when not in allowed:
        raise ValueError(f"kv_at: got {str(when)[:20]}, allowed: {', '.join(allowed)}")
    return str(when)


def _attention(data: Data, attention: RotaryAttention, states: States) -> QuantizedAttentionCore:
    keys = ("bits", "qk_transform", "v_transform", "v_scale", "kv", "clips", "kv_at")
    validate_keys({"kv": None, "clips": False, "kv_at": "read", **data}, keys)
    kv = _key_value_grid(data)
    bits, scale = data["bits"], data["v_scale"]
    if not isinstance(bits, dict) or sorted(bits) != sorted(OPERANDS):
        raise ValueError(f"bits: got {str(bits)[:60]}, allowed: {', '.join(OPERANDS)}")
    for operand in OPERANDS:
        if type(bits[operand]) is not int or (bits[operand] != 16 and not 2 <= bits[operand] <= 8):
            raise ValueError(f"bits.{operand}: got {str(bits[operand])[:20]}, allowed: 2 to 8, 16")
    shape = [attention.n_kv_heads, attention.head_dim]
    if scale is not None and scale != shape:
        raise ValueError(f"v_scale: got {str(scale)[:40]}, allowed: {shape}, null")
    v_scale: Tensor | None = None if scale is None else torch.empty(shape, dtype=torch.float32)
    qk = make_transform(data["qk_transform"], Place(attention.head_dim))
    v = make_transform(data["v_transform"], Place(attention.n_kv_heads * attention.head_dim, attention.head_dim))
    clips = torch.empty(len(CLIPPED), 2, dtype=torch.float32) if "clips" in data and flag(data, "clips") else None
    return QuantizedAttentionCore(bits, qk, v_scale, v, clips, kv, _kv_at(data, states))


def use_integers(model: MaskedDiffusionModel, where: Where = "always", join: Where = "on_gpu") -> int:
    """Let sites hand integers to their linears where all of these take them; returns how many sites may.

    Args:
        model: packed, its weights loaded.
        where: "always", "on_gpu" (what loading sets: a model that is moved to a GPU later needs nothing more), "never".
        join: where linears of one site are multiplied as one. A CPU gains nothing by it, and would hold them in memory
            of their own instead of that of the checkpoint's file.
    """
    count = 0
    for block in model.trunk().blocks:
        sites = model.block_sites(block)
        sites.attention.heads = Heads() if where == "never" else FusedHeads()
        for site, module in sites.inputs.items():
            linears = sites.readers(site)
            modules: Iterable[nn.Module] = linears.values()
            readers = [linear for linear in modules if isinstance(linear, PackedLinear)]
            experts = any(isinstance(key, ExpertRole) for key in linears)  # which read some of the tokens
            if isinstance(module, ActivationQuantizer) and readers and len(readers) == len(linears):
                able = module.format.bits <= 8 and all(
                    linear.takes_integers and sums_fit(linear.in_features, module.format, linear.weight_format)
                    for linear in readers
                )
                module.use_integers(where if able else "never", readers, "never" if experts else join)
                count += able
    return count
