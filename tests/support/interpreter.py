"""Triton's interpreter without what it does again at every call of a function: it lists all members of its language.

Imported for its effect; of none where kernels are compiled.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def names_of(language: Any) -> list[str]:
    """Names of the built-in functions, as they are before the first one is patched."""
    return [name for name, member in inspect.getmembers(language) if tl.core.is_builtin(member)]


def patch_builtin(language: Any, *rest: Any) -> None:
    """As Triton's own: what is patched already is no built-in function any more."""
    for name in names_of(language):
        member = getattr(language, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(language, name, member, *rest)


interpreter._patch_builtin = patch_builtin
