"""`--model starquant` for lm-eval's command line.

lm-eval has no plug-in mechanism, so the class must be imported into its process: `python -m starquant.evaluation
run --model starquant --model_args path=DIR --tasks winogrande` does that and hands over to the stock command line.
Settings that `run.py` takes from the model's protocol are given as model arguments and hold for all tasks.
"""

from __future__ import annotations

import dataclasses

import torch
from lm_eval.api.registry import register_model

from starquant.config.protocol import TaskProtocol
from starquant.diffusion import Sampler
from starquant.evaluation.lm import DiffusionLM
from starquant.models import load_model, load_tokenizer
from starquant.testbed.folders import FOLDERS, testbed_folder


@register_model("starquant")
class StarquantLM(DiffusionLM):
    """`DiffusionLM` from the arguments of a command line.

    Args:
        path: hub id or folder; "tiny" for the embedded model.
        mc_num: Monte-Carlo draws of likelihood tasks.
        cfg_scale: classifier-free guidance.
        gen_length: tokens of a generated answer.
        steps: denoising steps; by default one a token.
        block_length: LLaDA's block; by default the whole answer.
        temperature: of sampling.
        alg: Dream's rule for committing tokens.
    """

    def __init__(
        self,
        path: str = "tiny",
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = "auto",
        mc_num: int = 128,
        cfg_scale: float = 0.0,
        gen_length: int = 256,
        steps: int | None = None,
        block_length: int | None = None,
        temperature: float = 0.0,
        alg: str = "entropy",
        seed: int = 0,
        **_: object,
    ) -> None:
        folder = str(testbed_folder(path, 0)) if path in FOLDERS else path
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # lm-eval asks for cuda:0 unless told otherwise
        model = load_model(folder, dtype=dtype, device=device)
        size = "auto" if str(batch_size).startswith("auto") else batch_size  # lm-eval's own way: auto:N
        super().__init__(model, load_tokenizer(folder), batch_size=size, seed=seed)
        self._likelihood = TaskProtocol(mc_num=int(mc_num), cfg_scale=float(cfg_scale))
        sampler = self.family.sampler.of_length(gen_length, steps, block_length, float(temperature))
        own = {"cfg_scale": float(cfg_scale), "alg": alg}  # each is of some samplers only
        names = {field.name for field in dataclasses.fields(sampler)}  # type: ignore[arg-type]
        self._generation = dataclasses.replace(sampler, **{k: v for k, v in own.items() if k in names})  # type: ignore[type-var]

    def _protocol(self, needs: str) -> TaskProtocol:
        return self._likelihood

    def _sampler(self) -> Sampler:
        return self._generation
