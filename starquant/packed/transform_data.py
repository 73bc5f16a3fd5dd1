"""Online transforms as plain data and back, every number judged before anything is built from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from starquant.numerics import BIDIRECTIONAL, has_hadamard
from starquant.quantized.state_transforms import BlockAffine, SiteTransform, StateGate
from starquant.quantized.transforms import (
    HadamardTransform,
    HeadsHadamard,
    InvertibleKronecker,
    InvertibleTransform,
    KeyTransform,
    KroneckerTransform,
    OrthogonalTransform,
)

Data = dict[str, Any]

_DESCRIBE: dict[type[nn.Module], Callable[[Any], Data]] = {
    HadamardTransform: lambda t: {"kind": "hadamard", "width": t.width},
    HeadsHadamard: lambda t: {"kind": "heads_hadamard", "heads": t.heads},
    OrthogonalTransform: lambda t: {"kind": "orthogonal", "width": len(t.matrix_DD)},
    InvertibleTransform: lambda t: {"kind": "invertible", "width": len(t.matrix_DD)},
    KroneckerTransform: lambda t: {"kind": "kronecker", "a": len(t.a_MM), "b": len(t.b_NN)},
    InvertibleKronecker: lambda t: {
        "kind": "invertible_kronecker",
        "a": len(t.a_MM),
        "b": None if t.b_NN is None else len(t.b_NN),
    },
    KeyTransform: lambda t: {"kind": "key_transform", "width": len(t.matrix_EE)},
    StateGate: lambda t: {"kind": "state_gate", "width": t.width, "d_m": t.d_m, "d_u": t.d_u},
    BlockAffine: lambda t: {"kind": "block_affine", "shape": list(t.shift_CNG.shape)},
    SiteTransform: lambda t: {
        "kind": "site_transform",
        **{part: transform_data(getattr(t, part)) for part in ("exact", "correction", "gate")},
    },
}


def transform_data(transform: nn.Module | None) -> Data | None:
    """Return a transform as plain data; raises KeyError for one that is not known here."""
    return None if transform is None else _DESCRIBE[type(transform)](transform)


@dataclass(frozen=True)
class Place:
    """Where a transform will stand.

    Attributes:
        width: channels that it will transform.
        head_dim: that blocks of an affine map must divide; None for none.
        states: token states of the model.
    """

    width: int
    head_dim: int | None = None
    states: int = len(BIDIRECTIONAL)


def make_transform(data: object, place: Place) -> nn.Module | None:
    """Return the transform of plain data, its buffers unset.

    Args:
        data: None for no transform.
        place: where it will stand.

    Raises:
        ValueError: data that is not what `transform_data` writes, or does not fit.
    """
    if data is None:
        return None
    described = fields(data)
    if described["kind"] not in _MAKE:
        raise ValueError(f"transform kind: got {described['kind']!r}, allowed: {', '.join(_MAKE)}")
    keys, make = _MAKE[str(described["kind"])]
    validate_keys(described, keys)
    return make(described, place)


def _hadamard(data: Data, place: Place) -> nn.Module:
    width = place.width
    order = whole(data, "width", width, width)
    if not has_hadamard(order):
        raise ValueError(f"width: got {order}, for which no Hadamard matrix is known here")
    return HadamardTransform(order)


def _heads(data: Data, place: Place) -> nn.Module:
    width = place.width
    heads = whole(data, "heads", 1, width)
    if width % heads or not has_hadamard(heads):
        raise ValueError(f"heads: got {heads}, allowed: orders of Hadamard matrices that divide {width}")
    return HeadsHadamard(heads)


def _kronecker(data: Data, place: Place) -> nn.Module:
    width = place.width
    a, b = whole(data, "a", 1, width), whole(data, "b", 1, width)
    if a * b != width:
        raise ValueError(f"a, b: got {a} x {b}, allowed: a product of {width}")
    return KroneckerTransform(torch.empty(a, a), torch.empty(b, b))


def _invertible(data: Data, place: Place) -> nn.Module:
    width = place.width
    a = whole(data, "a", 1, width)
    if width % a:
        raise ValueError(f"a: got {a}, allowed: a divisor of {width}")
    b = None if data["b"] is None else whole(data, "b", width // a, width // a)
    return InvertibleKronecker(torch.empty(a, a), None if b is None else torch.empty(b, b))


def _keys(data: Data, place: Place) -> nn.Module:
    width = place.width
    size = whole(data, "width", width, width)
    return KeyTransform(torch.empty(size, size), torch.empty(size, size))


def _dense(data: Data, place: Place) -> nn.Module:
    width = place.width
    size = whole(data, "width", width, width)
    return (InvertibleTransform if data["kind"] == "invertible" else OrthogonalTransform)(torch.empty(size, size))


def _gate(data: Data, place: Place) -> nn.Module:
    width = place.width
    channels, d_m = whole(data, "width", width, width), whole(data, "d_m", 0, width)
    return StateGate(channels, d_m, whole(data, "d_u", 0, width - d_m))


def _affine(data: Data, place: Place) -> nn.Module:
    width, head_dim, shape = place.width, place.head_dim, data["shape"]
    if not isinstance(shape, list) or len(shape) != 3 or any(type(n) is not int or n < 1 for n in shape):
        raise ValueError(f"shape: got {shape!r}, allowed: conditions, blocks, g")
    conditions, blocks, size = shape
    if conditions != 1 and conditions % place.states:
        raise ValueError(f"shape: got {conditions} conditions, allowed: 1, or {place.states} token states a bin")
    if blocks * size != width or (head_dim is not None and head_dim % size):
        within = "" if head_dim is None else f", g a divisor of head_dim {head_dim}"
        raise ValueError(f"shape: got {blocks} blocks of g = {size}, allowed: {width} channels in all{within}")
    return BlockAffine(torch.empty(conditions, blocks, size, size), torch.empty(conditions, blocks, size))


def _site(data: Data, place: Place) -> nn.Module:
    return SiteTransform(*(make_transform(data[part], place) for part in ("exact", "correction", "gate")))


_MAKE: dict[str, tuple[tuple[str, ...], Callable[[Data, Place], nn.Module]]] = {
    "hadamard": (("width",), _hadamard),
    "heads_hadamard": (("heads",), _heads),
    "orthogonal": (("width",), _dense),
    "invertible": (("width",), _dense),
    "kronecker": (("a", "b"), _kronecker),
    "invertible_kronecker": (("a", "b"), _invertible),
    "key_transform": (("width",), _keys),
    "state_gate": (("width", "d_m", "d_u"), _gate),
    "block_affine": (("shape",), _affine),
    "site_transform": (("exact", "correction", "gate"), _site),
}


def fields(data: object) -> Data:
    """Return data that has a kind; raises ValueError for any other."""
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise ValueError(f"got {str(data)[:60]}, allowed: an object with a kind")
    return data


def validate_keys(data: Data, keys: tuple[str, ...]) -> None:
    """Raise ValueError unless data has these keys, and no others beside its kind."""
    got, wanted = set(data) - {"kind"}, set(keys)
    if got != wanted:
        faults = {"missing": sorted(wanted - got), "unknown": sorted(got - wanted)}
        named = [f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names]
        raise ValueError(f"{data['kind']}: keys {'; '.join(named)}")


def whole(data: Data, key: str, low: int, high: int) -> int:
    """Return a whole number within bounds; raises ValueError for anything else, true and 1.0 included."""
    number = data[key]
    if type(number) is not int or not low <= number <= high:
        allowed = str(low) if low == high else f"{low} to {high}"
        raise ValueError(f"{key}: got {str(number)[:20]}, allowed: {allowed}")
    return number


def flag(data: Data, key: str) -> bool:
    """Return true or false; raises ValueError for anything else."""
    switch = data[key]
    if not isinstance(switch, bool):
        raise ValueError(f"{key}: got {str(switch)[:20]!r}, allowed: true, false")
    return switch
