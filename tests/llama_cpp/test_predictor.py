"""Predictions of an engine that stands in for llama.cpp: what it is asked for, and how much of a prompt it sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from starquant.config.protocol import TaskProtocol
from starquant.config.samplers import LLaDASamplerSpec
from starquant.errors import ConfigError
from starquant.evaluation.lm import DiffusionLM
from starquant.llama_cpp import predictor
from starquant.llama_cpp.engine import Engine
from starquant.llama_cpp.predictor import LlamaCppPredictor, context_of
from starquant.models.base import MaskedDiffusionModel
from starquant.models.dream import DreamConfig
from starquant.runs.inputs import read_texts
from tests.support.specs import spec

WRITES = TaskProtocol(sampler=LLaDASamplerSpec(name="llada", gen_length=8, steps=1, block_length=8))
SCORES = TaskProtocol(mc_num=2)
GGUF = ("model=tiny", "method=gguf", "model.engine=llama_cpp", "model.path=m.gguf")


class StandIn:
    """Logits of nothing, of sequences that fit."""

    path = Path("m.gguf")

    def __init__(self, vocabulary: int, context: int) -> None:
        self.vocabulary, self.context = vocabulary, context

    def logits(self, ids_L: Tensor) -> Tensor:
        assert 0 < len(ids_L) <= self.context
        return torch.zeros(len(ids_L), self.vocabulary)


def predicting(model: MaskedDiffusionModel, context: int) -> LlamaCppPredictor:
    rows = int(model.trunk().embedding.num_embeddings)
    return LlamaCppPredictor(cast(Engine, StandIn(rows, context)), model)


def requests(kind: str, *arguments: tuple[str, Any]) -> list[Instance]:
    return [Instance(kind, {}, pair, 0, ("a_task", i, 1)) for i, pair in enumerate(arguments)]


def test_no_positions_have_no_logits(tiny: MaskedDiffusionModel) -> None:
    nowhere = torch.empty(0, dtype=torch.long)
    logits_NV = predicting(tiny, 64)(torch.zeros(1, 9, dtype=torch.long), (nowhere, nowhere))
    assert logits_NV.shape == (0, tiny.trunk().embedding.num_embeddings)


def test_prompts_are_cut_to_what_the_engine_holds(tiny: MaskedDiffusionModel, tiny_tokenizer: Any) -> None:
    """The model's own context is 256 tokens; a word is one."""
    predict, text = predicting(tiny, 64), "ada " * 100
    lm = DiffusionLM(tiny, tiny_tokenizer, WRITES, predict=predict)
    assert [len(prompt) for prompt in lm._prompts(requests("generate_until", (text, {})), 8)] == [56]
    assert len(lm.generate_until(requests("generate_until", (text, {})))) == 1
    lm = DiffusionLM(tiny, tiny_tokenizer, SCORES, predict=predict)
    ((score, _),) = lm.loglikelihood(requests("loglikelihood", (text, " oslo")))
    assert score < 0 and lm.cut.shares() == {"cut_prompts": 1.0}
    assert predicting(tiny, 4096).config.context_length == 256
    assert predict.config.mask_token_id == tiny.mask_token_id


def test_a_run_of_a_file_is_judged_by_what_llama_cpp_holds(
    tiny: MaskedDiffusionModel, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert context_of(DreamConfig(max_position_embeddings=131_072)) == 4096
    assert context_of(tiny.config) == 256
    long = "fidelity.source.length=200"
    assert read_texts(spec(*GGUF, long), tiny_tokenizer, tiny).fidelity
    monkeypatch.setattr(predictor, "LONGEST", 128)
    with pytest.raises(ConfigError, match=r"fidelity\.source\.length: got 200, allowed: at most .* 128 tokens"):
        read_texts(spec(*GGUF, long), tiny_tokenizer, tiny)
    assert read_texts(spec("model=tiny", long), tiny_tokenizer, tiny).fidelity
