"""Approximate generation: what it equals exactly, an independent slow version of what it approximates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starquant.config.speed import SpeedSpec
from starquant.diffusion import (
    BatchSize,
    DreamSampler,
    LLaDASampler,
    MaskPredictor,
    generate_approximately,
    generate_many,
)
from starquant.errors import ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.layers import AttentionCore
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.models.loading import load_model
from tests.support.paths import GOLDEN

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16], [17]]
LLADA = LLaDASampler(steps=12, gen_length=24, block_length=8)
DREAM = DreamSampler(steps=24, max_new_tokens=24, alg="maskgit_plus")
SAMPLERS: dict[str, Any] = {"llada": LLADA, "dream": DREAM}
CACHES = ("prefix", "dual")


def model_of(family: str, layers: int) -> MaskedDiffusionModel:
    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "mask_token_id": 63, "eos_token_id": 62}
    if family == "llada":
        shape = {"d_model": 32, "n_heads": 4, "n_layers": layers, "mlp_hidden_size": 48, "max_sequence_length": 64}
        return unmasking(LLaDAModelLM(LLaDAConfig(**shape, **sizes, init_std=0.5)))
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers}
    config = DreamConfig(**shape, **sizes, intermediate_size=48, pad_token_id=62, initializer_range=0.5)
    return unmasking(DreamModel(config))


def unmasking(model: MaskedDiffusionModel) -> MaskedDiffusionModel:
    """Let a random model never predict [MASK] itself."""
    head = model.get_output_embeddings()
    assert head is not None
    with torch.no_grad():
        head.weight[63] = 0.0
    return model.eval()


def speed_of(kv_cache: str = "none", threshold: float | None = None, block_length: int | None = None) -> SpeedSpec:
    """Without its validation: blocks alone, which no configuration may ask for, are what caches are compared with."""
    return SpeedSpec.model_construct(kv_cache=kv_cache, confidence_threshold=threshold, block_length=block_length)


def answers(model: MaskedDiffusionModel, sampler: Any, speed: SpeedSpec, size: int = 4, **more: Any) -> list[Any]:
    predict = MaskPredictor(model)
    found = generate_approximately(predict, PROMPTS, sampler, speed, batch_size=BatchSize(size), **more)
    return [answer for _, answer in sorted(found)]


def exact(model: MaskedDiffusionModel, sampler: Any) -> list[Any]:
    return [a for _, a in sorted(generate_many(MaskPredictor(model), PROMPTS, sampler, batch_size=BatchSize(4)))]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_no_shortcut_is_the_samplers_own_answer(temperature: float, cfg_scale: float) -> None:
    model, sampler = load_model(GOLDEN / "llada_mha"), replace(LLADA, temperature=temperature, cfg_scale=cfg_scale)
    assert answers(model, sampler, speed_of()) == exact(model, sampler)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("family", SAMPLERS)
def test_caches_are_exact_in_one_layer(family: str, kv_cache: str, size: int) -> None:
    model, sampler = model_of(family, 1), SAMPLERS[family]
    for threshold in (None, 0.4):
        plain = answers(model, sampler, speed_of("none", threshold, 8))
        assert answers(model, sampler, speed_of(kv_cache, threshold, 8), size) == plain
        assert len({tuple(answer) for answer in plain}) == len(PROMPTS)


class StaleCore(AttentionCore):
    """Attention over all columns that reads keys and values outside a window as they were when it was told to keep."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core, self.outside, self.kept = core, None, None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.outside is None:
            self.kept = k.clone(), v.clone()
        else:
            where = self.outside[None, None, :, None]
            k, v = torch.where(where, self.kept[0], k), torch.where(where, self.kept[1], v)
        return self.core(q, k, v, mask)


def slow_answer(model: MaskedDiffusionModel, prompt: list[int], kv_cache: str, threshold: float) -> list[int]:
    """One request, one block after the other, every pass over all columns, commits by a loop."""
    attentions = [model.block_sites(block).attention for block in model.trunk().blocks]
    cores = [StaleCore(attention.core) for attention in attentions]
    before = [attention.core for attention in attentions]
    for attention, core in zip(attentions, cores, strict=True):
        attention.core = core
    offset, start, length = model.logit_offset, len(prompt), len(prompt) + 24
    ids = torch.tensor([[*prompt, *[63] * 24]])
    for first in range(start, length, 8):
        outside = None
        while 63 in ids[0, first : first + 8].tolist():
            for core in cores:
                core.outside = outside
            probs = model(ids).logits[0].softmax(-1)
            masked = [i for i in range(first, first + 8) if int(ids[0, i]) == 63]
            at = {i: probs[max(0, i + offset)] for i in masked}
            best = max(masked, key=lambda i: float(at[i].max()))
            for i in masked:
                if i == best or float(at[i].max()) >= threshold:
                    ids[0, i] = int(at[i].argmax())
            columns = torch.arange(length)
            last = first + 8 if kv_cache == "dual" else length
            outside = (columns < first + offset) | (columns >= last)
    for attention, core in zip(attentions, before, strict=True):
        attention.core = core
    return ids[0, start:].tolist()


@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("family", SAMPLERS)
def test_caches_against_a_slow_version(family: str, kv_cache: str) -> None:
    model = model_of(family, 3)
    found = answers(model, SAMPLERS[family], speed_of(kv_cache, 0.5, 8))
    with torch.inference_mode():
        assert found == [slow_answer(model, prompt, kv_cache, 0.5) for prompt in PROMPTS]
    assert found != answers(model, SAMPLERS[family], speed_of("none", 0.5, 8))  # an approximation, it is


class Counting(MaskPredictor):
    """Counts passes and the columns they compute."""

    passes = columns = 0

    def _encode(self, ids_BL: Tensor, visible_BL: Tensor | None, cache: Any, *_: Any) -> Tensor:
        hidden = super()._encode(ids_BL, visible_BL, cache)
        self.passes, self.columns = self.passes + 1, self.columns + hidden.shape[1]
        return hidden


def test_shortcuts_compute_less() -> None:
    model, prompt = model_of("llada", 2), [[5, 6, 7, 8]]
    seen = {}
    for name, speed in {
        "plain": speed_of("none", None, 8),
        "prefix": speed_of("prefix", None, 8),
        "dual": speed_of("dual", None, 8),
        "threshold": speed_of("none", 0.01, 8),
    }.items():
        predict = Counting(model)
        sampler = replace(LLADA, steps=24)
        list(generate_approximately(predict, prompt, sampler, speed, batch_size=BatchSize(1)))
        seen[name] = (predict.passes, predict.columns)
    assert seen["plain"] == (24, 24 * 28)
    assert seen["prefix"] == (24, 3 * 28 + 7 * (24 + 16 + 8))
    assert seen["dual"] == (24, 3 * 28 + 21 * 8)
    assert seen["threshold"] == (3, 3 * 28)  # every token is surer than 1 %


def test_settled_answers_leave_after_their_block() -> None:
    model = model_of("llada", 2)
    whole = answers(model, LLADA, speed_of("dual", 0.5))
    ends = [8, 24, 16, 8]
    found = answers(model, LLADA, speed_of("dual", 0.5), settled=lambda i, known: len(known) >= ends[i])
    assert found == [answer[:end] for answer, end in zip(whole, ends, strict=True)]


def test_settled_answers_are_given_as_their_block_ends() -> None:
    model = model_of("llada", 2)
    found = generate_approximately(
        MaskPredictor(model), PROMPTS, LLADA, speed_of("dual"), batch_size=BatchSize(2), settled=lambda i, _: i == 2
    )
    assert next(found)[0] == 2 and len(list(found)) == 3


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_out_of_memory_changes_no_token(temperature: float) -> None:
    model, sampler = model_of("llada", 2), replace(LLADA, temperature=temperature)

    class Small(MaskPredictor):
        failures = 0

        def chunks(self, ids_BL: Tensor, *rest: Any, **more: Any) -> Any:
            yield from super().chunks(ids_BL, *rest, **more)
            if len(ids_BL) > 1 and bool((ids_BL[:, -24:-16] != 63).any()):  # in the middle of a block
                self.failures += 1
                raise torch.OutOfMemoryError("CUDA out of memory")

    small, speed = Small(model), speed_of("dual", None, 8)
    found = generate_approximately(small, PROMPTS, sampler, speed, batch_size=BatchSize(4))
    assert [answer for _, answer in sorted(found)] == answers(model, sampler, speed) and small.failures == 2


@pytest.mark.parametrize(
    ("sampler", "speed", "message"),
    [
        (LLADA, speed_of("dual", None, 7), r"^speed\.block_length: got 7, must divide the answer's 24 tokens$"),
        (replace(LLADA, remasking="random"), speed_of("dual"), "do not go with a sampler that commits by chance"),
        (replace(DREAM, alg="origin"), speed_of("dual"), "do not go with a sampler that commits by chance"),
        (replace(DREAM, alg_temp=0.3), speed_of("none", 0.9), "do not go with a sampler that commits by chance"),
    ],
)
def test_what_does_not_go_together(sampler: Any, speed: SpeedSpec, message: str) -> None:
    model = model_of("dream" if isinstance(sampler, DreamSampler) else "llada", 1)
    with pytest.raises(ConfigError, match=message):
        answers(model, sampler, speed)
