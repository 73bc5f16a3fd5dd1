"""DLLMQuant+: AWQ with DLLMQuant's additions (see `dllmquant`).

How CGQ's Hessian enters AWQ is open; ours is the one that AWQ's output error is measured with.
"""

from __future__ import annotations

from typing import Literal

from starquant.methods.awq import AWQ, AWQOptions
from starquant.methods.dllmquant import DLLMQuantAdditions, DLLMQuantOptions


class DLLMQuantPlusOptions(DLLMQuantOptions, AWQOptions):
    """AWQ's options and the three additions."""

    name: Literal["dllmquant_plus"]  # type: ignore[assignment]


class DLLMQuantPlus(DLLMQuantAdditions, AWQ):
    """AWQ on weighted trajectory states, with static value scales."""

    Options = DLLMQuantPlusOptions
