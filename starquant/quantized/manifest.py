"""What a model that was loaded quantized consists of, in the words of the manifest of one that was quantized here."""

from __future__ import annotations

from typing import Literal

from torch import nn

from starquant.models.base import MaskedDiffusionModel
from starquant.models.layers import InputSite
from starquant.quantized.activation_quantizer import ActivationQuantizer
from starquant.quantized.attention import OPERANDS, QuantizedAttentionCore, operand_transforms
from starquant.quantized.install import router_entries
from starquant.quantized.packed_linear import Packed
from starquant.store.manifest import ManifestEntry


def manifest_of(model: MaskedDiffusionModel) -> list[ManifestEntry]:
    """Return the manifest, in the order of the forward pass; what rounding lost is not known any more."""
    modules, trunk = dict(model.named_modules()), model.trunk()
    names = {module: name for name, module in modules.items()}
    entries = [_table(names, trunk.embedding, "embedding")]
    for index, block in enumerate(trunk.blocks):
        entries += _of_linears(model, modules, block, index) + router_entries(model, block, index)
    for index, block in enumerate(trunk.blocks):
        attention = model.block_sites(block).attention
        core = attention.core
        transforms = operand_transforms(core)
        for operand in OPERANDS:
            bits = core.formats[operand].bits if isinstance(core, QuantizedAttentionCore) else 16
            name, reason = f"{names[attention]}.{operand}", None if bits < 16 else "not quantized"
            entries.append(
                ManifestEntry(
                    name=name,
                    kind="operand",
                    role=operand,
                    block=index,
                    activation_bits=bits,
                    transform=transforms[operand],
                    reason=reason,
                )
            )
    return entries if trunk.head is None else [*entries, _table(names, trunk.head, "head")]


def _of_linears(
    model: MaskedDiffusionModel, modules: dict[str, nn.Module], block: nn.Module, index: int
) -> list[ManifestEntry]:
    entries = []
    for name, info in model.block_linears(block, index).items():
        linear, site = modules[name], modules[info.site]
        assert isinstance(site, InputSite)
        bits, reason = _bits(linear)
        inputs = site.format.bits if isinstance(site, ActivationQuantizer) else 16
        transform = None if site.transform is None else str(site.transform)
        entries.append(
            ManifestEntry(
                name=name,
                kind="linear",
                role=info.role.value,
                block=info.block,
                weight_bits=bits,
                activation_bits=inputs,
                site=info.site,
                transform=transform,
                reason=reason,
            )
        )
    return entries


def _bits(module: nn.Module) -> tuple[int, str | None]:
    return (module.weight_format.bits, None) if isinstance(module, Packed) else (16, "not packed")


def _table(names: dict[nn.Module, str], module: nn.Module, kind: Literal["embedding", "head"]) -> ManifestEntry:
    bits, reason = _bits(module)
    return ManifestEntry(name=names[module], kind=kind, role=kind, weight_bits=bits, reason=reason)
