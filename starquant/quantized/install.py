"""Install quantized modules in a model: the only place where quantizers are put into a model.

What was done is returned as a manifest: every linear and operand with its role and bits, or why it was left.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from torch import Tensor, nn

from starquant.config.bits import ActivationSpec, AttentionSpec, BitsSpec, WeightSpec
from starquant.errors import CheckpointError, ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.blocks_on_disk import changing, taken_up
from starquant.models.layers import InputSite
from starquant.models.roles import BlockSites, LinearInfo
from starquant.numerics import (
    PerChannel,
    PerGroup,
    PerToken,
    QuantFormat,
    Quantized,
    SqnrMeter,
    TokenState,
    all_finite,
    dequantize,
    quantize,
)
from starquant.numerics.chunks import row_slices
from starquant.numerics.formats import BLOCK_SIZE
from starquant.quantized.activation_quantizer import ActivationQuantizer
from starquant.quantized.attention import (
    OPERANDS,
    KeyValueGrid,
    QuantizedAttentionCore,
    operand_transforms,
    transforms_and_scales,
)
from starquant.quantized.fake_quant_linear import FakeQuantLinear
from starquant.quantized.packed_linear import PackedLinear
from starquant.quantized.tables import is_tied, quantize_embedding, quantize_head
from starquant.session.freed_memory import returning_freed
from starquant.session.progress import SILENT, Progress
from starquant.store.manifest import ManifestEntry

#: Computes the quantized weight of one linear.
WeightSolver = Callable[[LinearInfo, QuantFormat], Quantized]


def round_to_nearest(info: LinearInfo, weight_format: QuantFormat) -> Quantized:
    """Return the weight rounded to the nearest point of its grid."""
    return quantize(info.module.weight.data, weight_format)


def weight_format(spec: WeightSpec) -> QuantFormat:
    """Return the grid of the weights."""
    granularity = PerChannel() if spec.group_size is None else PerGroup(spec.group_size)
    return QuantFormat(spec.bits, spec.symmetric, granularity, spec.clip_ratio, spec.block)


def activation_format(spec: ActivationSpec) -> QuantFormat:
    """Return the grid of the inputs of linears."""
    granularity = PerToken() if spec.block is None else PerGroup(BLOCK_SIZE)
    return QuantFormat(spec.bits, spec.symmetric, granularity, spec.clip_ratio, spec.block)


def install(
    model: MaskedDiffusionModel,
    bits: BitsSpec,
    solve: WeightSolver = round_to_nearest,
    progress: Progress = SILENT,
    packed: bool = False,
    rewrite: Callable[[BlockSites, int], None] | None = None,
) -> list[ManifestEntry]:
    """Quantize a model in place, block by block, and return the manifest, in the order of the forward pass.

    Args:
        model: full-precision model; its declared linears are the ones that are touched, no others. Transforms
            that stand at its sites and attention already are kept.
        bits: bit-widths of everything.
        solve: computes the quantized weight of one linear.
        progress: draws a bar over the blocks.
        packed: keep weights as codes, 4-bit ones two a byte, instead of the values they stand for. A tied embedding
            stays values.
        rewrite: done to each block by its index first.

    Raises:
        ConfigError: a model that is quantized already, a group size that does not divide, a tied head asked for bits
            of its own.
        CheckpointError: non-finite weights, named.
    """
    if model.quantized:
        raise ConfigError("install: a method has been applied to this model already; load it again")
    validate_fit(model, bits)
    model.quantized = not bits.full_precision
    entries, operands = [quantize_embedding(model, bits, packed)], []
    blocks, changes = model.trunk().blocks, rewrite is not None or model.quantized
    for index in progress.bar(range(len(blocks)), "quantize", "block"):
        if changes and taken_up(model, index):
            continue
        with changing(model, index) if changes else nullcontext(blocks[index]) as block:
            if rewrite is not None:
                rewrite(model.block_sites(block), index)
            entries += _quantize_linears(model, block, index, bits, solve, packed)
            operands += quantize_attention(model, block, index, bits.attention)
    model.quantized = model.quantized or _transformed(model)
    return [*entries, *operands, quantize_head(model, bits, packed)]


def _quantize_linears(
    model: MaskedDiffusionModel, block: nn.Module, index: int, bits: BitsSpec, solve: WeightSolver, packed: bool
) -> list[ManifestEntry]:
    """Quantize a block's linears; nothing that holds their weights is left when the next block is read."""
    linears = model.block_linears(block, index).values()
    entries = [quantize_linear(model, block, info, bits, solve, packed) for info in returning_freed(linears)]
    return [*entries, *router_entries(model, block, index)]


def quantize_block(
    model: MaskedDiffusionModel, block: nn.Module, index: int, bits: BitsSpec, solve: WeightSolver
) -> None:
    """Quantize a copy of one block in place, as `install` does with the block itself."""
    for info in model.block_linears(block, index).values():
        quantize_linear(model, block, info, bits, solve)
    quantize_attention(model, block, index, bits.attention)


def validate_fit(model: MaskedDiffusionModel, bits: BitsSpec) -> None:
    """Judge bits by a model.

    Raises:
        ConfigError: a group size that does not divide, a tied head asked for bits of its own, keys and values rounded
            at commit where nothing is committed.
    """
    _validate_blocks(model, bits)
    if bits.attention.kv_at == "commit" and TokenState.CONTEXT not in model.states:
        raise ConfigError(
            f"bits.attention.kv_at: got commit, but {type(model).__name__} is bidirectional: no token's keys are ever "
            "final; allowed: read"
        )
    if is_tied(model) and bits.head != bits.embedding:
        raise ConfigError(f"bits.head: got {bits.head}, but the head is tied to the embedding ({bits.embedding} bits)")
    linears, spec = model.linears(), bits.weights
    for info in linears.values():
        if spec.bits < 16 and spec.group_size is not None and info.module.in_features % spec.group_size:
            raise ConfigError(
                f"bits.weights.group_size: got {spec.group_size}, which does not divide the "
                f"{info.module.in_features} inputs of {info.name}"
            )


def _validate_blocks(model: MaskedDiffusionModel, bits: BitsSpec) -> None:
    """Raise ConfigError when a width is no whole number of llama.cpp's blocks."""
    trunk, named = model.trunk(), dict[str, tuple[str, int]]()
    if bits.tables == "blocks" and min(bits.embedding, bits.head) < 16:
        named["the embedding"] = ("bits.tables", trunk.embedding.embedding_dim)
    if bits.activations.block is not None and bits.activations.bits < 16:
        named |= {info.name: ("bits.activations.block", info.module.in_features) for info in model.linears().values()}
    for name, (key, width) in named.items():
        if width % BLOCK_SIZE:
            raise ConfigError(f"{key}: blocks of {BLOCK_SIZE} do not divide the {width} inputs of {name}")


def quantize_linear(
    model: MaskedDiffusionModel,
    block: nn.Module,
    info: LinearInfo,
    bits: BitsSpec,
    solve: WeightSolver | None,
    packed: bool = False,
) -> ManifestEntry:
    """Quantize one linear of a block (or of a copy of it) and the site it reads; returns its manifest entry.

    `solve` None leaves the weight, which lies on its grid already.
    """
    weights, inputs = weight_format(bits.weights), activation_format(bits.activations)
    prefix = model.block_name(info.block) + "."
    path, site_path = info.name.removeprefix(prefix), info.site.removeprefix(prefix)
    site = block.get_submodule(site_path)
    assert isinstance(site, InputSite)
    transform = site.transform
    sqnr, reason = None, None
    if weights.quantizes and solve is not None:
        original = info.module.weight.data
        if not all_finite(original):
            raise CheckpointError(f"{info.name}.weight: holds values that are not finite")
        quantized = solve(info, weights)
        sqnr = _sqnr_of(original, quantized)
        kind = PackedLinear if packed else FakeQuantLinear
        block.set_submodule(path, kind.from_linear(info.module, quantized, weights))
    if inputs.quantizes:
        block.set_submodule(site_path, ActivationQuantizer(inputs, transform, site.state_clip))
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
        transform=None if transform is None else str(transform),
        reason=reason,
    )


def router_entries(model: MaskedDiffusionModel, block: nn.Module, index: int) -> list[ManifestEntry]:
    """Return the manifest entries of a block's routers, which stay at 16 bits."""
    names = {module: f"{model.block_name(index)}.{name}" for name, module in block.named_modules()}
    return [
        ManifestEntry(
            name=names[router], kind="router", role="router", block=index, weight_bits=16, reason="chooses experts"
        )
        for router in model.block_sites(block).routers.values()
    ]


def _sqnr_of(weight_OI: Tensor, quantized: Quantized) -> float | None:
    """Return the weight's ratio in decibels, some rows at a time."""
    meter = SqnrMeter()
    for rows in row_slices(weight_OI):
        meter.update(weight_OI[rows], dequantize(quantized.of_rows(rows), weight_OI.dtype))
    return meter.value()


def quantize_attention(
    model: MaskedDiffusionModel, block: nn.Module, index: int, spec: AttentionSpec
) -> list[ManifestEntry]:
    """Quantize the attention operands of a block (or of a copy of it); returns their manifest entries."""
    bits = {name: getattr(spec, name) for name in OPERANDS}
    attention = model.block_sites(block).attention
    handed = transforms_and_scales(attention.core)
    transforms = operand_transforms(attention.core)
    if min(bits.values()) < 16:
        attention.core = QuantizedAttentionCore(bits, **handed, kv=KeyValueGrid.of(spec), kv_at=spec.kv_at)
    name = next(name for name, module in block.named_modules() if module is attention)
    return [
        ManifestEntry(
            name=f"{model.block_name(index)}.{name}.{operand}",
            kind="operand",
            role=operand,
            block=index,
            activation_bits=bits[operand],
            transform=transforms[operand],
            reason=None if bits[operand] < 16 else f"bits.attention.{operand} = 16",
        )
        for operand in OPERANDS
    ]


def _transformed(model: MaskedDiffusionModel) -> bool:
    """Whether a method has left something that is no parameter."""
    return model.to_original_basis is not None or any(
        isinstance(module, InputSite) and module.transform is not None for module in model.modules()
    )
