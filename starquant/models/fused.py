"""Parameters that a checkpoint stores as one, row below row: fused q/k/v. In the model each is a linear of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

#: Ends of names: of what is stored, and of the parameters whose rows it holds, in their order.
Fused = Mapping[str, tuple[str, ...]]


class SplitRows(ConversionOps):
    """Rows of one stored tensor to the parameters they are, each as many as it has (transformers 5.17 has no such)."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **more: Any
    ) -> dict[str, Any]:
        """Return a tensor a target; names and arguments are transformers'."""
        (stored,) = input_dict.values()
        whole = stored[0] if isinstance(stored, list) else stored
        names = [more["full_layer_name"].replace(target_patterns[0], target) for target in target_patterns]
        parts = whole.split([more["model"].get_parameter(name).shape[0] for name in names])
        return {target: part.contiguous() for target, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        """What puts the rows together where a model is saved."""
        return Concatenate(0)


def stored_place(module: nn.Module, name: str, fused: Fused) -> tuple[str, slice | None]:
    """Return under which name a parameter of a module is stored, and which rows of that; None for all."""
    for stored, parts in fused.items():
        part = next((part for part in parts if name.endswith(part)), None)
        if part is None:
            continue
        prefix = name.removesuffix(part)
        rows = {other: module.get_parameter(prefix + other).shape[0] for other in parts}
        begin = sum(rows[other] for other in parts[: parts.index(part)])
        return prefix + stored, slice(begin, begin + rows[part])
    return name, None


def fuse_shapes(shapes: Mapping[str, tuple[int, ...]], fused: Fused) -> dict[str, tuple[int, ...]]:
    """Return names and shapes as they are stored."""
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        stored, part = next(
            ((stored, part) for stored, parts in fused.items() for part in parts if name.endswith(part)), (None, "")
        )
        whole = name if stored is None else name.removesuffix(part) + stored
        result[whole] = shape if whole not in result else (result[whole][0] + shape[0], *shape[1:])
    return result


def register_fused(model_class: type, fused: Fused) -> None:
    """Let transformers split what is stored as one when it loads a model, and put it together when it saves."""
    converters: list[WeightConverter | WeightRenaming] = []
    for stored, parts in fused.items():
        converters.append(WeightConverter(stored, list(parts), [SplitRows()]))
    register_checkpoint_conversion_mapping(model_class.__name__, converters, overwrite=True)
