"""Embedding and head: the two tables of the vocabulary, quantized a row or a block of llama.cpp at a time."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from starquant.config.bits import BitsSpec
from starquant.models.base import MaskedDiffusionModel
from starquant.numerics import PerChannel, PerGroup, QuantFormat, Quantized, SqnrMeter, dequantize, mse_clip, quantize
from starquant.numerics.chunks import row_slices
from starquant.numerics.formats import BLOCK_SIZE
from starquant.quantized.fake_quant_linear import BlockInputLinear
from starquant.quantized.packed_linear import PackedEmbedding, PackedLinear
from starquant.store.manifest import ManifestEntry


def table_format(bits: BitsSpec, width: int) -> QuantFormat:
    """Return the grid of an embedding or a head of so many bits."""
    if bits.tables == "rows" or width == 16:
        return QuantFormat(width, True, PerChannel())
    return QuantFormat(width, True, PerGroup(BLOCK_SIZE), block="q4_0" if width == 4 else "q8_0")


def quantize_embedding(model: MaskedDiffusionModel, bits: BitsSpec, packed: bool) -> ManifestEntry:
    """Quantize the embedding in place, or, packed, to codes; returns its manifest entry.

    A tied one stays values, but in blocks of llama.cpp: such a model is written, not run.
    """
    return _table(
        model, model.trunk().embedding, "embedding", bits, packed and (bits.tables == "blocks" or not is_tied(model))
    )


def round_embedded(hidden_BLD: Tensor, ids_BL: Tensor, bits: BitsSpec) -> Tensor:
    """Return embedded tokens as `quantize_embedding` leaves them: every row of the table has a grid of its own."""
    word_BL = ids_BL.to(hidden_BLD.device).unique(return_inverse=True)[1]
    place_U = word_BL.new_zeros(int(word_BL.max()) + 1)
    place_U[word_BL.flatten()] = torch.arange(word_BL.numel(), device=word_BL.device)  # one of each word's
    rows_UD, grid = hidden_BLD.flatten(0, 1)[place_U], table_format(bits, bits.embedding)
    parts = [dequantize(_codes(rows_UD[rows], grid), rows_UD.dtype) for rows in row_slices(rows_UD)]
    return torch.cat(parts)[word_BL]


def _codes(rows_ND: Tensor, grid: QuantFormat) -> Quantized:
    return quantize(rows_ND, grid, clip=mse_clip(rows_ND, grid) if grid.block == "q4_0" else None)


def is_tied(model: MaskedDiffusionModel) -> bool:
    """Whether the head is the embedding: left out (LLaDA), or sharing its weight (Dream)."""
    trunk = model.trunk()
    table = getattr(trunk.embedding, "weight", None)
    if table is None and trunk.head is not None:  # packed: then it is tied where the checkpoint says so
        return bool(model.config.tie_word_embeddings) and not isinstance(trunk.head, PackedLinear)
    return trunk.head is None or getattr(trunk.head, "weight", None) is table


def quantize_head(model: MaskedDiffusionModel, bits: BitsSpec, packed: bool) -> ManifestEntry:
    """Quantize the head in place, or, packed, to codes; a tied one is the embedding. Returns its manifest entry."""
    head = model.trunk().head
    if head is None or is_tied(model):
        reason = "tied to the embedding" if bits.embedding < 16 else "bits.head = 16"
        _quantize_head_input(model, bits)
        return ManifestEntry(name="head", kind="head", role="head", weight_bits=bits.embedding, reason=reason)
    entry = _table(model, head, "head", bits, packed)
    if not packed:
        _quantize_head_input(model, bits)
    return entry


def _quantize_head_input(model: MaskedDiffusionModel, bits: BitsSpec) -> None:
    """Let a head in blocks read what llama.cpp reads; where the head is left out there is no place for that."""
    head = model.trunk().head
    if head is None or bits.tables == "rows" or bits.head == 16:
        return
    name = {m: n for n, m in model.named_modules()}[head]
    model.set_submodule(name, BlockInputLinear.from_linear(head, table_format(bits, 8)))


def _table(
    model: MaskedDiffusionModel,
    module: nn.Embedding | nn.Linear,
    role: Literal["embedding", "head"],
    bits: BitsSpec,
    packed: bool,
) -> ManifestEntry:
    """Quantize embedding or head, one scale a vocabulary row, or a block of one."""
    width = bits.embedding if role == "embedding" else bits.head
    name = {m: n for n, m in model.named_modules()}[module]
    if width == 16:
        return ManifestEntry(name=name, kind=role, role=role, weight_bits=16, reason=f"bits.{role} = 16")
    grid, meter, table = table_format(bits, width), SqnrMeter(), module.weight.data
    new: PackedEmbedding | PackedLinear | None = None
    if packed and isinstance(module, nn.Embedding):
        new = PackedEmbedding.like(module, grid)
    elif packed and isinstance(module, nn.Linear):
        new = PackedLinear.like(module, grid)
    for rows in row_slices(table):
        codes = _codes(table[rows], grid)
        rounded = dequantize(codes, table.dtype)
        meter.update(table[rows], rounded)
        if new is None:
            table[rows] = rounded
        else:
            new.keep(codes, rows)
    if new is not None:
        model.set_submodule(name, new)
    return ManifestEntry(name=name, kind=role, role=role, weight_bits=width, weight_sqnr_db=meter.value())
