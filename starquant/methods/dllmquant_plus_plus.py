"""DLLMQuant++: QuaRot and GPTQ with DLLMQuant's additions (see `dllmquant`)."""

from __future__ import annotations

from typing import Literal

from starquant.methods.dllmquant import DLLMQuantAdditions, DLLMQuantOptions
from starquant.methods.quarot import QuaRot, QuaRotOptions


class DLLMQuantPlusPlusOptions(DLLMQuantOptions, QuaRotOptions):
    """QuaRot's options and the three additions."""

    name: Literal["dllmquant_plus_plus"]  # type: ignore[assignment]


class DLLMQuantPlusPlus(DLLMQuantAdditions, QuaRot):
    """QuaRot on weighted trajectory states, with static value scales."""

    Options = DLLMQuantPlusPlusOptions
