"""Exact rewritings of linears and norms: the numbers move, the function stays. All computed in float64.

y = x W^T with W [out, in]; R is orthogonal and acts on rows, x -> x R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from starquant.errors import ConfigError
from starquant.models.layers import RMSNorm
from starquant.numerics import Rotation, apply_hadamard


@contextmanager
def rounded_once(module: nn.Module) -> Iterator[None]:
    """Hold a module's parameters in float64 while it is rewritten, so that half precision is rounded to once."""
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.data = parameter.data.double()
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])


@torch.no_grad()
def set_weight(linear: nn.Linear, weight_OI: Tensor) -> None:
    """Write a weight, in the linear's own dtype."""
    linear.weight.copy_(weight_OI)


def fold_gain(norm: nn.Module, linears: Iterable[nn.Linear]) -> None:
    """Move an RMSNorm's gain into the linears behind it: W diag(g), gain one; raises ConfigError for another norm.

    Nothing is subtracted from the embedding: removing its mean preserves a LayerNorm model, not an RMSNorm one.
    """
    gain_D = _gain(norm)
    scale_input(linears, gain_D)
    with torch.no_grad():
        gain_D.fill_(1.0)


def _gain(norm: nn.Module) -> Tensor:
    if not isinstance(norm, RMSNorm | nn.RMSNorm):  # another may subtract a mean or add a bias
        raise ConfigError(f"method: the model's {type(norm).__name__} cannot take a rewriting; allowed: RMSNorm")
    return cast(Tensor, norm.weight)


def scale_input(linears: Iterable[nn.Linear], scale_I: Tensor) -> None:
    """Make linears read x / s: W diag(s)."""
    for linear in linears:
        set_weight(linear, linear.weight.double() * scale_I.double())


@torch.no_grad()
def divide_gain(norm: nn.Module, scale_D: Tensor) -> None:
    """Make an RMSNorm give x / s; raises ConfigError for another norm."""
    gain_D = _gain(norm)
    gain_D.copy_(gain_D.double() / scale_D.double())


@torch.no_grad()
def divide_output(linear: nn.Linear, scale_O: Tensor) -> None:
    """Make a linear give y / s."""
    set_weight(linear, linear.weight.double() / scale_O.double()[:, None])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() / scale_O.double())


def rotate_input(linears: Iterable[nn.Linear], rotation: Rotation) -> None:
    """Make linears read x R: W R."""
    transform_input(linears, rotation.apply)


def transform_input(linears: Iterable[nn.Linear], change: Callable[[Tensor], Tensor]) -> None:
    """Make linears read the orthogonally changed x: each row of W is changed likewise, in float64."""
    for linear in linears:
        set_weight(linear, change(linear.weight.double()))


def rotate_output(linear: nn.Linear, rotation: Rotation) -> None:
    """Make a linear give y R: R^T W, b R."""
    _map_output(linear, rotation.apply)


def hadamard_input(linear: nn.Linear) -> None:
    """Make a linear read x H: W H."""
    transform_input([linear], apply_hadamard)


def hadamard_heads_output(linear: nn.Linear, heads: int) -> None:
    """Make a linear give y (I (x) H), each head's channels rotated by the same H."""
    _map_output(linear, lambda y: within_heads(y, heads))


def hadamard_heads_input(linear: nn.Linear, heads: int) -> None:
    """Make a linear read x (I (x) H)."""
    transform_input([linear], lambda w: within_heads(w, heads))


def within_heads(x: Tensor, heads: int) -> Tensor:
    """Return x (I (x) H), [..., heads * E]."""
    rotated: Tensor = apply_hadamard(x.unflatten(-1, (heads, -1))).flatten(-2)
    return rotated


def across_heads(x: Tensor, heads: int) -> Tensor:
    """Return x (H (x) I), [..., heads * E]."""
    mixed: Tensor = apply_hadamard(x.unflatten(-1, (heads, -1)).transpose(-1, -2)).transpose(-1, -2).flatten(-2)
    return mixed


def hadamard_across_heads_input(linear: nn.Linear, heads: int) -> None:
    """Make a linear read x (H (x) I)."""
    transform_input([linear], lambda w: across_heads(w, heads))


@torch.no_grad()
def _map_output(linear: nn.Linear, change: Callable[[Tensor], Tensor]) -> None:
    set_weight(linear, change(linear.weight.double().T).T)
    if linear.bias is not None:
        linear.bias.copy_(change(linear.bias.double()))
