"""Whether a packed checkpoint describes all that its bits say of activations: what is left out would run at 16 bits.

Of a linear, embedding or head that is left out the parameters are missing, which is judged elsewhere; a site or an
attention may have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from starquant.errors import CheckpointError
from starquant.models.base import MaskedDiffusionModel
from starquant.quantized.attention import OPERANDS


def validate_complete(model: MaskedDiffusionModel, modules: Mapping[str, Any], bits: Mapping[str, Any]) -> None:
    """Compare what is described with the bits of the whole.

    Args:
        model: as its configuration makes it, before anything is put into it.
        modules: `quantization_config.modules`.
        bits: `quantization_config.bits`.

    Raises:
        CheckpointError: an input site or attention that has below 16 bits by the one and is not described, or as one of
            16 bits, by the other.
    """
    for name, kind, key, width in _wanted(model, bits):
        if type(width) is not int or width >= 16:
            continue
        got = _bits_of(modules.get(name), kind, key)
        if got is None or got == 16:
            there = "nothing" if got is None else "16 bits"
            raise CheckpointError(
                f"quantization_config.modules: {name}: got {there}, needed: {kind} of {width} bits, as "
                f"quantization_config.bits.{key} says"
            )


def _wanted(model: MaskedDiffusionModel, bits: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    """Yield (module, kind, place in the bits, bits) of every site and attention operand."""
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    for info in model.linears().values():
        yield info.site, "site", "activations.bits", _at(bits, "activations", "bits")
    for block in model.trunk().blocks:
        core = names[model.block_sites(block).attention.core]
        for operand in OPERANDS:
            yield core, "attention", f"attention.{operand}", _at(bits, "attention", operand)


def _at(bits: Mapping[str, Any], part: str, key: str) -> Any:
    inside = bits.get(part)
    return inside.get(key) if isinstance(inside, Mapping) else None


def _bits_of(data: Any, kind: str, key: str) -> Any:
    """Return the bits that a described module has; None where it is none of the kind."""
    if not isinstance(data, Mapping) or data.get("kind") != kind:
        return None
    return _at(data, "grid", "bits") if kind == "site" else _at(data, "bits", key.rpartition(".")[2])
