"""A model as a GGUF file: its own codes, not rounded again, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from starquant.diffusion.special_tokens import eos_token_ids
from starquant.errors import ConfigError
from starquant.llama_cpp.architecture import NORMS, architecture_of, hyperparameters, linear_tensor, row_order
from starquant.llama_cpp.blocks import BLOCK_BYTES, Bytes, block_bytes, float_bytes
from starquant.llama_cpp.foldable import validate_foldable
from starquant.llama_cpp.seal import BLANK, KEY, seal
from starquant.llama_cpp.tokenizer import Vocabulary, vocabulary_of
from starquant.models import family_of
from starquant.models.base import MaskedDiffusionModel
from starquant.models.blocks_on_disk import resident_block
from starquant.numerics.formats import BLOCK_SIZE
from starquant.quantized.packed_linear import Packed
from starquant.quantized.tables import is_tied
from starquant.store.exports import unfinished

#: What llama.cpp calls a file by, from the type of most of its weights.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Planned:
    """A tensor of the file: its bytes are made when it is written.

    Attributes:
        name: in the file.
        shape: of its numbers.
        kind: type of its numbers, as `gguf.GGMLQuantizationType` has it.
        data: makes its bytes, [..., bytes of a row].
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    data: Callable[[], Bytes]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        columns = self.shape[-1]
        if self.kind in DTYPES:
            return columns * DTYPES[self.kind].itemsize
        return columns // BLOCK_SIZE * BLOCK_BYTES[self.kind.lower()]


def write_gguf(
    model: MaskedDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    kind: str = "F16",
    made_by: Mapping[str, str] | None = None,
) -> int:
    """Write a model, at full precision or with packed weights; the file appears last and whole.

    Args:
        model: whose blocks lie in memory, or on disk.
        tokenizer: of its checkpoint.
        target: the file.
        kind: type of weights that are not quantized: "F16", "BF16", "F32". Norms and biases are F32.
        made_by: goes into the file as `starquant.KEY`, beside the file's own digest.

    Returns:
        Bytes of the file.

    Raises:
        ConfigError: what the format cannot hold, by name; a file that cannot be written.
    """
    import gguf

    validate_foldable(model)
    planned = list(plan(model, kind))
    writer = gguf.GGUFWriter(None, architecture_of(str(model.config.model_type)).name)
    _add_keys(writer, model, tokenizer, kind, made_by or {})
    for tensor in planned:
        shape = (*tensor.shape[:-1], tensor.row_bytes)
        count = math.prod(shape)
        writer.add_tensor_info(tensor.name, shape, np.dtype("uint8"), count, gguf.GGMLQuantizationType[tensor.kind])
    try:
        with unfinished(target) as work:
            path = work / target.name
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in planned:
                writer.write_tensor_data(tensor.data())
            writer.close()
            seal(path)
            path.replace(target)
    except OSError as error:
        raise ConfigError(f"export.dir: {target}: cannot be written: {error}") from error
    return target.stat().st_size


def plan(model: MaskedDiffusionModel, kind: str) -> Iterator[Planned]:
    """Yield every tensor of the file; each parameter of the model is one, or part of one."""
    trunk, resident = model.trunk(), _Resident(model)
    yield _weight("token_embd.weight", trunk.embedding, kind, lambda: trunk.embedding)
    for index, block in enumerate(trunk.blocks):
        names = {module: name for name, module in block.named_modules()}
        sites = model.block_sites(block)
        for site, norm in sites.norms.items():
            assert site in NORMS
            read = partial(resident.module, index, names[norm])
            yield _vector(f"blk.{index}.{NORMS[site.kind]}.weight", norm, "weight", read)
        for role, linear in sites.linears.items():
            name, read = linear_tensor(index, role), partial(resident.module, index, names[linear])
            order = row_order(model, role, linear.out_features)
            yield _weight(f"{name}.weight", linear, kind, read, order)
            if linear.bias is not None:
                yield _vector(f"{name}.bias", linear, "bias", read, order)
    yield _vector("output_norm.weight", trunk.norm, "weight", lambda: trunk.norm)
    head = trunk.head
    if head is not None and not is_tied(model):
        yield _weight("output.weight", head, kind, lambda: head)


class _Resident:
    """Modules of blocks with what they hold: of blocks on disk, those of one block at a time are in memory."""

    def __init__(self, model: MaskedDiffusionModel) -> None:
        self.model, self.index = model, -1
        self.block: nn.Module | None = None

    def module(self, index: int, name: str) -> nn.Module:
        """Return a module of a block by its name in it."""
        if self.model.stored_blocks is None:
            return self.model.trunk().blocks[index].get_submodule(name)
        if self.block is None or self.index != index:
            self.block = None  # before the next one takes memory
            self.block, self.index = resident_block(self.model, index), index
        return self.block.get_submodule(name)


Read = Callable[[], nn.Module]


def _vector(name: str, module: nn.Module, leaf: str, read: Read, order: Tensor | None = None) -> Planned:
    """Return a norm's weight or a bias; `module` tells the shape, what `read` returns the numbers."""

    def numbers() -> Bytes:
        values: Any = getattr(read(), leaf)
        return float_bytes((values if order is None else values[order]).cpu(), torch.float32)

    return Planned(name, tuple(getattr(module, leaf).shape), "F32", numbers)


def _weight(name: str, module: nn.Module, kind: str, read: Read, order: Tensor | None = None) -> Planned:
    """Return a weight's codes, or its numbers in the type of what is not quantized; `module` and `read` as above."""
    rows = slice(None) if order is None else order
    if isinstance(module, Packed):
        block = module.weight_format.block
        if block is None:
            raise ConfigError(f"export.format: got gguf, which has no type for {name}'s grid; allowed: bits=q4_0, q8_0")

        def codes() -> Bytes:
            packed: Any = read()
            data: Bytes = block_bytes(packed.quantized(), block)[rows]
            return data

        return Planned(name, (module.rows, module.columns), block.upper(), codes)

    def numbers() -> Bytes:
        weight: Any = read().weight
        return float_bytes(weight[rows].cpu(), DTYPES[kind])

    shaped: Any = module.weight
    return Planned(name, tuple(shaped.shape), kind, numbers)


def _add_keys(
    writer: Any, model: MaskedDiffusionModel, tokenizer: PreTrainedTokenizerBase, kind: str, made_by: Mapping[str, str]
) -> None:
    architecture = architecture_of(str(model.config.model_type)).name
    block = model.block_sites(model.trunk().blocks[0])
    first: Any = next(iter(block.linears.values()))
    most = first.weight_format.block.upper() if isinstance(first, Packed) and first.weight_format.block else kind
    writer.add_file_type(FILE_TYPES[most])
    writer.add_quantization_version(2)
    writer.add_name(made_by.get("name", architecture))
    writer.add_string(KEY, BLANK)
    for key, value in made_by.items():
        writer.add_string(f"starquant.{key}", value)
    for key, value in hyperparameters(model).items():
        adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        adds[type(value)](f"{architecture}.{key}", value)
    writer.add_diffusion_shift_logits(model.logit_offset != 0)
    vocabulary = vocabulary_of(tokenizer, int(model.trunk().embedding.num_embeddings))
    _add_vocabulary(writer, vocabulary, model)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, model: MaskedDiffusionModel) -> None:
    config = model.config
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.model != "none":
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_list(list(vocabulary.tokens))
        writer.add_token_types(list(vocabulary.types))
        writer.add_token_merges(list(vocabulary.merges))
        if vocabulary.chat_template is not None:
            writer.add_chat_template(vocabulary.chat_template)
    ends = eos_token_ids(config)
    if ends:
        writer.add_eos_token_id(ends[0])
    for name in ("bos", "pad"):
        if (index := getattr(config, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(int(index))
    writer.add_mask_token_id(model.mask_token_id)
    writer.add_add_bos_token(family_of(model).prepend_bos)
