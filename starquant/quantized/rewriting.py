"""Exact rewritings of linears and norms: the numbers move, the function stays. All computed in float64.

y = x W^T with W [out, in]; R is orthogonal and acts on rows, x -> x R. Weights are rewritten in place, a few rows (or
columns, where outputs are mixed) at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from starquant.errors import ConfigError
from starquant.models.layers import RMSNorm
from starquant.models.roles import BlockSites
from starquant.numerics import Rotation, apply_hadamard
from starquant.numerics.chunks import row_slices
from starquant.session.freed_memory import returning_freed


@contextmanager
def rounded_once(sites: BlockSites) -> Iterator[None]:
    """Put off what is done to a block's weights, then do it to one weight after the other, rounding each once.

    For rewritings that touch a weight more than once; a single one is computed in float64 and rounded once anyway.
    One weight at a time is held in float64, a block's norms and biases all the while. Nothing inside may read a weight.
    """
    linears = [*sites.linears.values(), *sites.routers.values()]
    weights = [linear.weight for linear in linears]
    modules = (*linears, *sites.norms.values())
    small = [p for module in modules for p in module.parameters() if all(p is not weight for weight in weights)]
    dtypes = [parameter.dtype for parameter in small]
    for parameter in small:
        parameter.data = parameter.data.double()
    for weight in weights:
        setattr(weight, _PUT_OFF, [])
    try:
        yield
    finally:
        for parameter, dtype in zip(small, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
        for weight in returning_freed(weights):
            _catch_up(weight)


#: Attribute of a weight whose rewriting is put off: (what goes by rows or columns, map) in their order.
_PUT_OFF = "starquant_put_off"


@torch.no_grad()
def _catch_up(weight_OI: Tensor) -> None:
    """Do to a weight what was put off, in float64."""
    waiting = getattr(weight_OI, _PUT_OFF)
    delattr(weight_OI, _PUT_OFF)
    if not waiting:
        return
    exact_OI = weight_OI.data.double()
    for go_over, change in waiting:
        go_over(exact_OI, change)
    weight_OI.copy_(exact_OI)  # in place: weights that are new memory, one beside every freed copy, would double it


@torch.no_grad()
def map_rows(weight_OI: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Put each row through a map of float64 rows [n, I], in place."""
    if (waiting := getattr(weight_OI, _PUT_OFF, None)) is not None:
        waiting.append((map_rows, change))
        return
    for rows in row_slices(weight_OI):
        weight_OI[rows] = change(weight_OI[rows].double()).to(weight_OI.dtype)


@torch.no_grad()
def map_columns(weight_OI: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Put each column through a map of float64 rows [n, O], in place."""
    if (waiting := getattr(weight_OI, _PUT_OFF, None)) is not None:
        waiting.append((map_columns, change))
        return
    for columns in row_slices(weight_OI.T):
        turned_nO = weight_OI[:, columns].T.double().contiguous()
        weight_OI[:, columns] = change(turned_nO).T.to(weight_OI.dtype)


def fold_gain(norm: nn.Module, linears: Iterable[nn.Linear]) -> None:
    """Move an RMSNorm's gain into the linears behind it: W diag(g), gain one; raises ConfigError for another norm.

    Nothing is subtracted from the embedding: removing its mean preserves a LayerNorm model, not an RMSNorm one.
    """
    gain_D = _gain(norm)
    scale_input(linears, gain_D.detach().clone())
    with torch.no_grad():
        gain_D.fill_(1.0)


def _gain(norm: nn.Module) -> Tensor:
    if not isinstance(norm, RMSNorm | nn.RMSNorm):  # another may subtract a mean or add a bias
        raise ConfigError(f"method: the model's {type(norm).__name__} cannot take a rewriting; allowed: RMSNorm")
    return cast(Tensor, norm.weight)


def scale_input(linears: Iterable[nn.Linear], scale_I: Tensor) -> None:
    """Make linears read x / s: W diag(s)."""
    for linear in linears:
        map_rows(linear.weight, lambda w_nI: w_nI * scale_I.to(w_nI))


@torch.no_grad()
def divide_gain(norm: nn.Module, scale_D: Tensor) -> None:
    """Make an RMSNorm give x / s; raises ConfigError for another norm."""
    gain_D = _gain(norm)
    gain_D.copy_(gain_D.double() / scale_D.double())


@torch.no_grad()
def divide_output(linear: nn.Linear, scale_O: Tensor) -> None:
    """Make a linear give y / s."""
    map_columns(linear.weight, lambda w_nO: w_nO / scale_O.to(w_nO))
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() / scale_O.double())


def rotate_input(linears: Iterable[nn.Linear], rotation: Rotation) -> None:
    """Make linears read x R: W R."""
    transform_input(linears, rotation.apply)


def transform_input(linears: Iterable[nn.Linear], change: Callable[[Tensor], Tensor]) -> None:
    """Make linears read a changed x: each row of W goes through `change` in float64.

    Of an orthogonal map it is the map itself, of another x -> x P it is w -> w P^-T.
    """
    for linear in linears:
        map_rows(linear.weight, change)


def rotate_output(linear: nn.Linear, rotation: Rotation) -> None:
    """Make a linear give y R: R^T W, b R."""
    transform_output(linear, rotation.apply)


def hadamard_input(linear: nn.Linear) -> None:
    """Make a linear read x H: W H."""
    transform_input([linear], apply_hadamard)


def hadamard_heads_output(linear: nn.Linear, heads: int) -> None:
    """Make a linear give y (I (x) H), each head's channels rotated by the same H."""
    transform_output(linear, lambda y: within_heads(y, heads))


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
def transform_output(linear: nn.Linear, change: Callable[[Tensor], Tensor]) -> None:
    """Make a linear give the changed y: a linear map of rows, in float64, put on each column of W and on the bias."""
    map_columns(linear.weight, change)
    if linear.bias is not None:
        linear.bias.copy_(change(linear.bias.double()))
