"""The model arguments that lm-eval's command line passes on, as validated data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from starquant.config.fields import Rows, Scale, Seed, Spec, Steps, Tokens
from starquant.config.messages import explain
from starquant.errors import ConfigError

#: What other model classes of lm-eval call the checkpoint.
_OTHERS = {"pretrained": "path", "model": "path", "model_name": "path", "peft": "path"}


class ModelArguments(Spec):
    """Arguments of the model class `starquant` (`--model_args`); they hold for all tasks.

    Attributes:
        path: hub id or folder; "tiny", "smol", ... for a test-bed's model (`model.testbed`).
        dtype: of the weights; None for the stored one.
        device: of torch; None for the CPU.
        batch_size: sequences a forward pass; "auto", or lm-eval's "auto:N", for what memory holds.
        mc_num: Monte-Carlo draws of likelihood tasks.
        cfg_scale: classifier-free guidance.
        gen_length: tokens of a generated answer.
        steps: denoising steps; None for one a token.
        block_length: LLaDA's block; None for the whole answer.
        temperature: of sampling.
        alg: Dream's rule for committing tokens; None for "entropy".
        seed: of Monte-Carlo draws and sampling.
    """

    path: Annotated[str, Field(min_length=1)]
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    batch_size: int | str = "auto"
    mc_num: Rows = 128
    cfg_scale: Scale = 0.0
    gen_length: Tokens = 256
    steps: Steps | None = None
    block_length: Tokens | None = None
    temperature: Scale = 0.0
    alg: Literal["entropy", "maskgit_plus", "origin", "topk_margin"] | None = None
    seed: Seed = 0

    @field_validator("batch_size", mode="before")
    @classmethod
    def _validate_batch_size(cls, size: Any) -> Any:
        text = str(size)
        if text == "auto" or (text.startswith("auto:") and text[5:].isdecimal()):
            return "auto"
        if isinstance(size, bool) or not text.isdecimal() or int(text) < 1:
            raise ValueError(f"got {size!r}, allowed: auto, or a whole number from 1")
        return int(text)


def read_model_arguments(arguments: Mapping[str, Any]) -> ModelArguments:
    """Validate model arguments.

    Raises:
        ConfigError: one line a problem: an unknown argument and the nearest name, a value that is not allowed, no path.
    """
    try:
        return ModelArguments.model_validate(dict(arguments))
    except ValidationError as error:
        raise ConfigError("\n".join(f"--model_args: {_explained(problem)}" for problem in error.errors())) from None


def _explained(problem: Mapping[str, Any]) -> str:
    text, name = explain(ModelArguments, problem, {}), str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "missing":
        return f"{text}; needed: path=DIR, a checkpoint folder, a hub id, or the name of a test-bed"
    if problem["type"] == "extra_forbidden" and name in _OTHERS:
        return f"{text.partition(' Did you mean')[0]} Did you mean '{_OTHERS[name]}'?"
    return text
