"""Install quantized modules in a model: the only place where a model is changed.

What was done is returned as a manifest: every linear and operand with its role and bits, or why it was left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from starquant.errors import CheckpointError, ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import LinearInfo
from starquant.numerics import PerChannel, PerGroup, PerToken, QuantFormat, fake_quantize, sqnr_db
from starquant.records.manifest import ManifestEntry
from starquant.runtime.attention import OPERANDS, QuantizedAttentionCore
from starquant.runtime.linear import FakeQuantLinear
from starquant.runtime.sites import ActivationQuantizer
from starquant.spec import AttentionSpec, BitsSpec, WeightSpec

WeightSolver = Callable[[LinearInfo, QuantFormat], Tensor]


def round_to_nearest(info: LinearInfo, weight_format: QuantFormat) -> Tensor:
    """Return the weight rounded to the nearest point of its grid."""
    return fake_quantize(info.module.weight.data, weight_format)


def weight_format(spec: WeightSpec) -> QuantFormat:
    """Return the grid of the weights."""
    granularity = PerChannel() if spec.group_size is None else PerGroup(spec.group_size)
    return QuantFormat(spec.bits, spec.symmetric, granularity, spec.clip_ratio)


def install(
    model: MaskedDiffusionModel, bits: BitsSpec, solve: WeightSolver = round_to_nearest, progress: bool = False
) -> list[ManifestEntry]:
    """Quantize a model in place and return the manifest, in the order of the forward pass.

    Args:
        model: full-precision model; its declared linears are the ones that are touched, no others.
        bits: bit-widths of everything.
        solve: computes the quantized weight of one linear.
        progress: show a progress bar over the linears.

    Raises:
        ConfigError: a group size that does not divide; a tied head asked for bits of its own.
        CheckpointError: non-finite weights, named.
    """
    linears = model.linears()
    _check_groups(linears, bits.weights)
    entries = [_embedding(model, bits)]
    activation = QuantFormat(bits.activations.bits, bits.activations.symmetric, PerToken(), bits.activations.clip_ratio)
    for info in tqdm(linears.values(), desc="quantize", unit="linear", disable=not progress, leave=False):
        entries.append(_linear(model, info, weight_format(bits.weights), activation, solve))
    entries += _operands(model, bits.attention)
    entries.append(_head(model, bits))
    return entries


def _check_groups(linears: dict[str, LinearInfo], spec: WeightSpec) -> None:
    for info in linears.values():
        if spec.group_size is not None and info.module.in_features % spec.group_size:
            raise ConfigError(
                f"bits.weights.group_size: got {spec.group_size}, which does not divide the "
                f"{info.module.in_features} inputs of {info.name}"
            )


def _linear(
    model: MaskedDiffusionModel, info: LinearInfo, weights: QuantFormat, inputs: QuantFormat, solve: WeightSolver
) -> ManifestEntry:
    sqnr, reason = None, None
    if weights.quantizes:
        original = info.module.weight.data
        if not bool(torch.isfinite(original).all()):
            raise CheckpointError(f"{info.name}.weight: holds values that are not finite")
        quantized = solve(info, weights)
        sqnr = sqnr_db(original, quantized)
        model.set_submodule(info.name, FakeQuantLinear.from_linear(info.module, quantized, weights))
    if inputs.quantizes:
        model.set_submodule(info.site, ActivationQuantizer(inputs))
    if not (weights.quantizes or inputs.quantizes):
        reason = "bits.weights.bits = bits.activations.bits = 16"
    return ManifestEntry(
        name=info.name,
        kind="linear",
        role=info.role.value,
        block=info.block,
        weight_bits=weights.bits,
        activation_bits=inputs.bits,
        site=info.site,
        weight_sqnr_db=sqnr,
        reason=reason,
    )


def _operands(model: MaskedDiffusionModel, spec: AttentionSpec) -> list[ManifestEntry]:
    bits = {name: getattr(spec, name) for name in OPERANDS}
    names = {module: name for name, module in model.named_modules()}
    entries = []
    for index, block in enumerate(model.trunk().blocks):
        attention = model.block_sites(block).attention
        if min(bits.values()) < 16:
            attention.core = QuantizedAttentionCore(bits)
        for operand in OPERANDS:
            reason = None if bits[operand] < 16 else f"bits.attention.{operand} = 16"
            entries.append(
                ManifestEntry(
                    name=f"{names[attention]}.{operand}",
                    kind="operand",
                    role=operand,
                    block=index,
                    activation_bits=bits[operand],
                    reason=reason,
                )
            )
    return entries


def _embedding(model: MaskedDiffusionModel, bits: BitsSpec) -> ManifestEntry:
    if _is_tied(model) and bits.head != bits.embedding:
        raise ConfigError(f"bits.head: got {bits.head}, but the head is tied to the embedding ({bits.embedding} bits)")
    return _table(model, model.trunk().embedding, "embedding", bits.embedding)


def _is_tied(model: MaskedDiffusionModel) -> bool:
    """Whether the head is the embedding: left out (LLaDA), or sharing its weight (Dream)."""
    trunk = model.trunk()
    return trunk.head is None or trunk.head.weight is trunk.embedding.weight


def _head(model: MaskedDiffusionModel, bits: BitsSpec) -> ManifestEntry:
    head = model.trunk().head
    if head is None or _is_tied(model):
        reason = "tied to the embedding" if bits.embedding < 16 else "bits.head = 16"
        return ManifestEntry(name="head", kind="head", role="head", weight_bits=bits.embedding, reason=reason)
    return _table(model, head, "head", bits.head)


def _table(model: MaskedDiffusionModel, module: nn.Module, role: str, width: int) -> ManifestEntry:
    """Quantize embedding or head, one scale a vocabulary row."""
    name = {m: n for n, m in model.named_modules()}[module]
    if width == 16:
        return ManifestEntry(name=name, kind=role, role=role, weight_bits=16, reason=f"bits.{role} = 16")
    quantized = fake_quantize(module.weight.data, QuantFormat(width, True, PerChannel()))
    sqnr = sqnr_db(module.weight.data, quantized)
    with torch.no_grad():
        module.weight.copy_(quantized)
    return ManifestEntry(name=name, kind=role, role=role, weight_bits=width, weight_sqnr_db=sqnr)
