"""`--model starquant` for lm-eval's command line.

lm-eval has no plug-in mechanism, so the class must be imported into its process: `python -m starquant.evaluation
run --model starquant --model_args path=DIR --tasks winogrande` does that and hands over to the stock command line.
Settings that `run.py` takes from the model's protocol are given as model arguments and hold for all tasks.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from starquant.config.lm_eval import ModelArguments, read_model_arguments
from starquant.config.protocol import TaskProtocol
from starquant.diffusion import Sampler
from starquant.errors import ConfigError
from starquant.evaluation.lm import DiffusionLM
from starquant.evaluation.prompts import CutItems
from starquant.models import load_model, load_tokenizer
from starquant.models.family import Family
from starquant.models.loading import validate_device
from starquant.testbed.folders import checkpoint_of


@register_model("starquant")
class StarquantLM(DiffusionLM):
    """`DiffusionLM` from the arguments of a command line (`config.lm_eval.ModelArguments`).

    Raises:
        StarquantError: an unknown argument, a value that is not allowed, no path, a device that is not there, settings
            that the model's family does not have.
    """

    def __init__(self, **arguments: Any) -> None:
        chosen = read_model_arguments(arguments)
        folder = checkpoint_of(chosen.path)
        try:
            device = validate_device(chosen.device)
        except ConfigError as error:
            why = str(error).removeprefix("runtime.device: ")
            raise ConfigError(f"device: {why} (lm-eval's own default is cuda:0); allowed here: --device cpu") from None
        model = load_model(folder, dtype=chosen.dtype, device=device)
        super().__init__(model, load_tokenizer(folder), batch_size=chosen.batch_size, seed=chosen.seed)
        self._shares: dict[str, dict[str, float]] = {}
        self._likelihood = TaskProtocol(mc_num=chosen.mc_num, cfg_scale=chosen.cfg_scale)
        self._generation, self._guides = _sampler_of(self.family, chosen)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> StarquantLM:
        """Return the model of `--model_args`, which win over lm-eval's own options of the same name."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**options | dict(arg_dict))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> StarquantLM:
        """Return the model of `--model_args` as one string."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each request as `DiffusionLM` does.

        Raises:
            ConfigError: guidance of a family whose sampler has none, a request for another temperature.
        """
        if self._likelihood.cfg_scale and not self._guides:
            raise ConfigError(
                f"--model_args: cfg_scale: got {self._likelihood.cfg_scale}, but {self.family.name} generates without "
                "guidance; allowed with generation tasks: 0"
            )
        wanted = {temperature for request in requests if (temperature := _temperature(request.args[1])) is not None}
        own = float(getattr(self._generation, "temperature", 0.0))
        if wanted - {own}:
            raise ConfigError(
                f"generation_kwargs: the task (or --gen_kwargs) wants temperature {sorted(wanted - {own})[0]}, "
                f"--model_args: temperature is {own}; give it there"
            )
        answers = super().generate_until(requests, disable_tqdm)
        self._say_cut()
        return answers

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each request as `DiffusionLM` does."""
        scores = super().loglikelihood(requests, disable_tqdm)
        self._say_cut()
        return scores

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval's results say of the model: of each task, the share of items that were cut."""
        return {"cut": self._shares}

    def _say_cut(self) -> None:
        """Say what was cut since the last time, a line a task, and keep it for the results."""
        for task, cut in self.cut.by_leaf().items():
            for sentence in cut.sentences(task, self.predict.config.context_length):
                print(f"warning: {sentence}", file=sys.stderr, flush=True)
            if shares := cut.shares():
                self._shares[task] = shares
        self.cut = CutItems()

    def _protocol(self, needs: str) -> TaskProtocol:
        return self._likelihood

    def _sampler(self) -> Sampler:
        return self._generation


def _sampler_of(family: Family, chosen: ModelArguments) -> tuple[Sampler, bool]:
    """Return the sampler of a family under these arguments, and whether it can guide."""
    sampler = family.sampler.of_length(chosen.gen_length, chosen.steps, chosen.block_length, chosen.temperature)
    names = {field.name for field in dataclasses.fields(sampler)}  # type: ignore[arg-type]
    if chosen.alg is not None and "alg" not in names:
        raise ConfigError(f"--model_args: alg: got '{chosen.alg}', but {family.name} has no such setting; leave it out")
    own: dict[str, Any] = {"cfg_scale": chosen.cfg_scale, "alg": chosen.alg or "entropy"}
    settings = {name: value for name, value in own.items() if name in names}
    return dataclasses.replace(sampler, **settings), "cfg_scale" in names  # type: ignore[type-var]


def _temperature(gen_kwargs: Mapping[str, Any]) -> float | None:
    """Return the temperature that a request wants, None where it names none or is greedy by another word."""
    if not gen_kwargs.get("do_sample", True):
        return None
    value = gen_kwargs.get("temperature")
    return float(value) if isinstance(value, int | float) else None
