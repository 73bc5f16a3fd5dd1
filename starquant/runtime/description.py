"""What was put into a model, as plain data, and back: modules without their tensors.

Tensors are the modules' buffers and travel under their names. `describe(model)` and `rebuild(model, described)` are
inverse to each other; nothing of how a method found anything is needed to rebuild it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from starquant.errors import CheckpointError, ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.layers import AttentionCore, InputSite
from starquant.numerics import PerChannel, PerGroup, PerToken, QuantFormat
from starquant.records.manifest import ManifestEntry
from starquant.runtime.attention import OPERANDS, QuantizedAttentionCore
from starquant.runtime.packed import PackedLinear
from starquant.runtime.sites import ActivationQuantizer
from starquant.runtime.token_state import BlockAffine, SiteTransform, StateGate
from starquant.runtime.transforms import HadamardTransform, HeadsHadamard, KroneckerTransform, OrthogonalTransform

Plain = dict[str, Any]

_DESCRIBE: dict[type[nn.Module], Callable[[Any], Plain]] = {
    HadamardTransform: lambda t: {"kind": "hadamard", "width": t.width},
    HeadsHadamard: lambda t: {"kind": "heads_hadamard", "heads": t.heads},
    OrthogonalTransform: lambda t: {"kind": "orthogonal", "width": len(t.matrix_DD)},
    KroneckerTransform: lambda t: {"kind": "kronecker", "a": len(t.a_MM), "b": len(t.b_NN)},
    StateGate: lambda t: {"kind": "state_gate", "width": t.width, "masked": t.masked, "unmasked": t.unmasked},
    BlockAffine: lambda t: {"kind": "block_affine", "shape": list(t.shift_CNG.shape)},
    SiteTransform: lambda t: {
        "kind": "site_transform",
        **{part: transform_data(getattr(t, part)) for part in ("exact", "correction", "gate")},
    },
}


def _affine(data: Plain) -> nn.Module:
    conditions, blocks, size = data["shape"]
    return BlockAffine(torch.empty(conditions, blocks, size, size), torch.empty(conditions, blocks, size))


_MAKE: dict[str, Callable[[Plain], nn.Module]] = {
    "hadamard": lambda d: HadamardTransform(d["width"]),
    "heads_hadamard": lambda d: HeadsHadamard(d["heads"]),
    "orthogonal": lambda d: OrthogonalTransform(torch.empty(d["width"], d["width"])),
    "kronecker": lambda d: KroneckerTransform(torch.empty(d["a"], d["a"]), torch.empty(d["b"], d["b"])),
    "state_gate": lambda d: StateGate(d["width"], d["masked"], d["unmasked"]),
    "block_affine": _affine,
    "site_transform": lambda d: SiteTransform(*(make_transform(d[part]) for part in ("exact", "correction", "gate"))),
}


def transform_data(transform: nn.Module | None) -> Plain | None:
    """Return a transform as plain data; raises KeyError for one that is not known here."""
    return None if transform is None else _DESCRIBE[type(transform)](transform)


def make_transform(data: Plain | None) -> nn.Module | None:
    """Return the transform of plain data, its buffers unset."""
    return None if data is None else _MAKE[data["kind"]](data)


def describe(model: MaskedDiffusionModel) -> Plain:
    """Return every module that a method has put in, by name."""
    found: Plain = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            grid, bias = _grid(module.weight_format), module.bias is not None
            found[name] = {"kind": "packed_linear", **grid, "bias": bias}
        elif isinstance(module, ActivationQuantizer) or (
            isinstance(module, InputSite) and module.transform is not None
        ):
            grid = _grid(module.format) if isinstance(module, ActivationQuantizer) else None
            clip, transform = module.state_clip is not None, transform_data(module.transform)
            found[name] = {"kind": "site", "grid": grid, "state_clip": clip, "transform": transform}
        elif isinstance(module, QuantizedAttentionCore):
            shape = None if module.v_scale_KE is None else list(module.v_scale_KE.shape)
            found[name] = {
                "kind": "attention",
                "bits": {operand: module.formats[operand].bits for operand in OPERANDS},
                "qk_transform": transform_data(module.qk_transform),
                "v_transform": transform_data(module.v_transform),
                "v_scale": shape,
            }
    return found


def _grid(fmt: QuantFormat) -> Plain:
    size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else None
    return {"bits": fmt.bits, "symmetric": fmt.symmetric, "group_size": size, "clip_ratio": fmt.clip_ratio}


def rebuild(model: MaskedDiffusionModel, described: Plain) -> None:
    """Put described modules into a model as its configuration makes it; their buffers are on its device, unset.

    Raises:
        CheckpointError: modules that the model does not have, or that do not fit it.
    """
    modules = dict(model.named_modules())
    for name, data in described.items():
        if name not in modules:
            raise CheckpointError(f"quantization_config.modules: {name}: the model has no such module")
        try:
            model.set_submodule(name, _module(data, modules[name]))
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, RuntimeError, ConfigError) as error:
            what = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            raise CheckpointError(f"quantization_config.modules: {name}: not usable ({what})") from None
    model.quantized = True


def _module(data: Plain, before: nn.Module) -> nn.Module:
    if data["kind"] == "packed_linear":
        if not isinstance(before, nn.Linear):
            raise ValueError(f"a packed linear for {type(before).__name__}")
        size = data["group_size"]
        if size is not None and before.in_features % size:
            raise ValueError(f"group_size {size} does not divide {before.in_features} inputs")
        fmt = QuantFormat(data["bits"], data["symmetric"], PerChannel() if size is None else PerGroup(size))
        return PackedLinear(before.in_features, before.out_features, fmt, before.weight.dtype if data["bias"] else None)
    if data["kind"] not in ("site", "attention"):
        raise ValueError(f"unknown kind {data['kind']!r}")
    if data["kind"] == "site":
        if not isinstance(before, InputSite):
            raise ValueError(f"a site for {type(before).__name__}")
        clip = torch.empty(2) if data["state_clip"] else None
        transform, grid = make_transform(data["transform"]), data["grid"]
        if grid is None:
            return InputSite(transform, clip)
        fmt = QuantFormat(grid["bits"], grid["symmetric"], PerToken(), grid["clip_ratio"])
        return ActivationQuantizer(fmt, transform, clip)
    if not isinstance(before, AttentionCore):
        raise ValueError(f"an attention for {type(before).__name__}")
    scale: Tensor | None = None if data["v_scale"] is None else torch.empty(*data["v_scale"])
    transforms = make_transform(data["qk_transform"]), make_transform(data["v_transform"])
    return QuantizedAttentionCore(data["bits"], transforms[0], scale, transforms[1])


def use_integers(model: MaskedDiffusionModel, wanted: bool = True) -> int:
    """Let sites hand integers to their linears where all of these take them; returns how many sites do."""
    count = 0
    for block in model.trunk().blocks:
        sites = model.block_sites(block)
        for site, module in sites.inputs.items():
            if isinstance(module, ActivationQuantizer):
                readers = sites.readers(site).values()
                packed = all(isinstance(linear, PackedLinear) and linear.takes_integers for linear in readers)
                fits = module.format.symmetric and module.format.bits <= 8
                module.gives_integers = wanted and packed and fits
                count += module.gives_integers
    return count


def packed_linears(model: MaskedDiffusionModel) -> list[ManifestEntry]:
    """Return the manifest of a packed checkpoint's linears."""
    modules, entries = dict(model.named_modules()), []
    for name, info in model.linears().items():
        linear, site = modules[name], modules[info.site]
        assert isinstance(site, InputSite)
        entries.append(
            ManifestEntry(
                name=name,
                kind="linear",
                role=info.role.value,
                block=info.block,
                weight_bits=linear.weight_format.bits if isinstance(linear, PackedLinear) else 16,
                activation_bits=site.format.bits if isinstance(site, ActivationQuantizer) else 16,
                site=info.site,
                transform=None if site.transform is None else str(site.transform),
                reason=None if isinstance(linear, PackedLinear) else "not packed",
            )
        )
    return entries
