"""Answers that leave the batch early are those of a run that waits for every token."""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval.api.instance import Instance
from transformers import PreTrainedTokenizerBase

from starquant.config.protocol import TaskProtocol
from starquant.config.samplers import LLaDASamplerSpec
from starquant.evaluation.lm import DiffusionLM
from starquant.models.base import MaskedDiffusionModel
from starquant.testbed.items import Split, rng_for
from starquant.testbed.tiny.programs import random_task


def answers(tiny: MaskedDiffusionModel, tokenizer: PreTrainedTokenizerBase, stops: list[str], **more: Any) -> list[str]:
    sampler = LLaDASamplerSpec(name="llada", gen_length=32, steps=32, block_length=8)
    lm = DiffusionLM(tiny, tokenizer, TaskProtocol(sampler=sampler), **more)
    drawn = rng_for("early finish", 0, 0)
    prompts = [random_task(drawn, Split.VALIDATION).prompt for _ in range(7)]
    return lm.generate_until([Instance("generate_until", {}, (p, {"until": stops}), i) for i, p in enumerate(prompts)])


@pytest.mark.parametrize("stops", [[], ["1"], ["3 4", "4"], ["no such text"]])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_texts_do_not_depend_on_leaving_early(
    stops: list[str],
    batch_size: int,
    tiny: MaskedDiffusionModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    early = answers(tiny, tiny_tokenizer, stops, batch_size=batch_size)
    monkeypatch.setattr(DiffusionLM, "_settled", lambda *_: False)
    assert early == answers(tiny, tiny_tokenizer, stops, batch_size=batch_size)


def test_a_stop_string_settles_only_what_no_longer_one_can_change(
    tiny: MaskedDiffusionModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Cut at "3 4 5" first, "2 3 4" may still become "2 " instead of "2 3 "; and "4 6" may cut off what held a "4"."""
    lm = DiffusionLM(tiny, tiny_tokenizer)

    def tokens(text: str) -> list[int]:
        found: list[int] = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    stops = ["3 4 5", "4"]
    assert not lm._settled(tokens("2 3 4"), stops)
    assert not lm._settled(tokens("2 3 4 6 7"), stops)
    assert lm._settled(tokens("2 3 4 6 7 8 9 8 9 8"), stops)
    assert lm._text(tokens("2 3 4 5 7"), stops).strip() == "2"
    assert lm._text(tokens("2 3 4 6 7"), stops).strip() == "2 3"
    assert not lm._settled(tokens("2 3"), stops)
    assert not lm._settled(tokens("2 3"), [])
    assert lm._settled([*tokens("2 3"), int(tiny.config.eos_token_id)], [])
