"""Passes through a block that end where what is looked at has been computed."""

from __future__ import annotations

from typing import Any

from torch import nn


class _Reached(Exception):
    """The module that a pass goes as far as has given its output."""


def run_as_far_as(last: nn.Module, block: nn.Module, *arguments: Any) -> None:
    """Run a block until one of its modules has given its output and the hooks that it has by now have seen it."""

    def stop(*_: Any) -> None:
        raise _Reached

    handle = last.register_forward_hook(stop)
    try:
        block(*arguments)
    except _Reached:
        pass
    finally:
        handle.remove()
