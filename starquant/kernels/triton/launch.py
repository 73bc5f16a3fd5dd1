"""Triton: kernels that begin before the one in front of them has ended (programmatic dependent launch).

Few tokens are over before a launch is: on Hopper and later a kernel may be scheduled while the last one still runs, and
waits until what stood in front of it has ended and can be read. (Weights asked for before that wait were read no sooner
on an H100, but slower: 3.45 ms a forward of 16 tokens in place of 3.07.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Compute capability that knows it.
NEEDED = (9, 0)
_allowed = True


@triton.jit
def start(EARLY: tl.constexpr):
    """Let the next kernel begin, and wait for what the last one wrote."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def early_arguments(x: Tensor) -> dict[str, bool]:
    """Return what launches take where kernels may begin early, and where not."""
    if _allowed and x.is_cuda and torch.cuda.get_device_capability(x.device) >= NEEDED:
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@contextmanager
def one_after_another() -> Iterator[None]:
    """Launch kernels that begin when the last one has ended, while the context lasts: so a profile tells them apart."""
    global _allowed
    _allowed = False
    try:
        yield
    finally:
        _allowed = True
