"""Evaluation: our default against a plain re-implementation of the official loops, same model, items and draws.

The plain loop takes one request at a time: 128 Monte-Carlo copies in batches of 32 with the logits of every position
(likelihood), every denoising step of a batch of one with the logits of every position (generation). Scores and tokens
are compared. Models are random, LLaDA- and Dream-shaped; items are JSONL files (`--data`, the layout of
docs/offline-data.md), their words hashed to token ids, else random ids of like lengths.

A random model does not end its answers: an answer counts as ended after 20 to 60 tokens, as if EOS stood there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import machine
from torch import Tensor

from starquant.diffusion import (
    BatchSize,
    DreamSampler,
    LikelihoodEstimator,
    LLaDASampler,
    MaskPredictor,
    ScoreRequest,
    generate_many,
)
from starquant.diffusion.masking import seeded_generator
from starquant.diffusion.patterns import NOISES
from starquant.diffusion.samplers import DenoisingState
from starquant.models.base import MaskedDiffusionModel
from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM

VOCABULARY, MC_NUM, COPIES = 32_000, 128, 32


def model_of(family: str) -> MaskedDiffusionModel:
    """Return a random model: d = 256, 4 layers, 32,000 words."""
    torch.manual_seed(0)
    if family == "llada":
        return LLaDAModelLM(
            LLaDAConfig(
                d_model=256,
                n_heads=4,
                n_layers=4,
                mlp_hidden_size=768,
                vocab_size=VOCABULARY,
                max_sequence_length=2048,
                mask_token_id=VOCABULARY - 1,
                eos_token_id=VOCABULARY - 2,
            )
        ).eval()
    return DreamModel(
        DreamConfig(
            hidden_size=256,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=4,
            intermediate_size=768,
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
            mask_token_id=VOCABULARY - 1,
            eos_token_id=VOCABULARY - 2,
            pad_token_id=VOCABULARY - 2,
        )
    ).eval()


class FullLogits(MaskPredictor):
    """Computes the logits of every position, then takes those asked for."""

    @torch.inference_mode()
    def chunks(  # noqa: D102
        self, ids_BL: Tensor, positions: tuple[Tensor, Tensor], *, visible_BL: Tensor | None = None, **_: object
    ) -> Iterator[tuple[slice, Tensor]]:
        rows, columns = positions
        logits: Tensor = self.model(input_ids=ids_BL, attention_mask=visible_BL).logits.float()
        yield slice(None), logits[rows, self._source_columns(rows, columns, visible_BL)]


def enumerated(request: ScoreRequest) -> bool:
    """Return whether ours sums over all mask patterns, so that the plain loop's draws only estimate its score."""
    return len(request.target) == 1 or 2 ** len(request.target) - 1 <= MC_NUM


def plain_score(predict: MaskPredictor, request: ScoreRequest) -> float:
    """One request: all its draws, 32 copies a pass."""
    noise = NOISES[predict.model.likelihood_noise]
    generator = seeded_generator(0, "likelihood", request.prompt, request.target)
    patterns = noise.draw(len(request.target), MC_NUM, generator)
    start, total = len(request.prompt), 0.0
    for masked_RT, weight_R in zip(patterns.masked_RT.split(COPIES), patterns.weight_R.split(COPIES), strict=True):
        ids = torch.tensor([request.prompt + request.target + request.suffix]).repeat(len(masked_RT), 1)
        answer = ids[:, start : start + len(request.target)]
        target = answer.clone()
        answer[masked_RT] = predict.mask_id
        rows, columns = masked_RT.nonzero(as_tuple=True)
        log_probs = predict(ids, (rows, columns + start)).log_softmax(1)
        found = log_probs.gather(1, target[rows, columns][:, None])[:, 0].double()
        total += float((found * weight_R[rows]).sum())
    return total


def plain_answer(predict: MaskPredictor, prompt: Sequence[int], sampler: LLaDASampler | DreamSampler) -> list[int]:
    """One request: every step of the whole answer."""
    ids = torch.tensor([[*prompt, *[predict.mask_id] * sampler.answer_length]])
    state = DenoisingState(ids, len(prompt), None, [seeded_generator(0, "generation", tuple(prompt))])
    with torch.inference_mode():
        sampler.denoise(predict, state)
    return ids[0, len(prompt) :].tolist()


def words(text: str) -> tuple[int, ...]:
    """Return a token id a word."""
    return tuple(zlib.crc32(word.encode()) % (VOCABULARY - 10) for word in text.split())


def likelihood_requests(kind: str, data: Path | None, count: int, suffix: tuple[int, ...]) -> list[ScoreRequest]:
    """Return requests of multiple-choice items, four choices each: "one token" or "several"."""
    found: list[ScoreRequest] = []
    for index in range(-(-count // 4)):
        context, choices = _item(kind, data, index)
        found += [ScoreRequest(context, choice, suffix) for choice in choices]
    return found[:count]


def _item(kind: str, data: Path | None, index: int) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    draw = random.Random(index)
    if data is None:
        low, high, short, long = (60, 140, 1, 2) if kind == "one token" else (20, 60, 6, 18)
        lengths = (draw.randrange(low, high), *(draw.randrange(short, long) for _ in range(4)))
        sample = [tuple(draw.randrange(VOCABULARY - 10) for _ in range(n)) for n in lengths]
        return sample[0], sample[1:]
    if kind == "one token":
        row = _rows(sorted((data / "mmlu" / "test").glob("*.jsonl"))[0])[index]
        return words(row["question"] + " " + " ".join(row["choices"]) + " Answer:"), [words(x) for x in "ABCD"]
    row = _rows(data / "hellaswag" / "validation.jsonl.gz")[index]
    return words(row["ctx"]), [words(ending) for ending in row["endings"]]


def prompts_of(data: Path | None, count: int) -> list[list[int]]:
    """Return prompts of generated answers."""
    draw = random.Random(0)
    if data is None:
        return [[draw.randrange(VOCABULARY - 10) for _ in range(draw.randrange(30, 90))] for _ in range(count)]
    return [list(words(row["question"])) for row in _rows(data / "gsm8k" / "test.jsonl")[:count]]


def _rows(path: Path) -> list[dict[str, Any]]:
    read = gzip.open if path.suffix == ".gz" else open
    with read(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def timed(name: str, count: int, plain: Any, ours: Any, same: Any) -> None:
    """Run both once each (they take many passes), ours first and last; print seconds, ratio, and whether they agree."""
    began = time.perf_counter()
    found = ours()
    first = time.perf_counter() - began
    began = time.perf_counter()
    expected = plain()
    slow = time.perf_counter() - began
    began = time.perf_counter()
    ours()
    fast = min(first, time.perf_counter() - began)
    ratio, agreement = slow / fast, same(found, expected)
    print(f"{name:44s} plain {slow:7.2f} s, ours {fast:6.2f} s: {ratio:6.1f}x  ({count} requests; {agreement})")


def largest(requests: Sequence[ScoreRequest], found: Sequence[float], expected: Sequence[float]) -> str:
    """Say how far scores lie apart, relative to their size; of enumerated targets, how far the draws are off."""
    apart: dict[bool, float] = {}
    for request, a, b in zip(requests, found, expected, strict=True):
        exact = enumerated(request)
        apart[exact] = max(apart.get(exact, 0.0), abs(a - b) / max(1.0, abs(b)))
    told = {False: "same draws, scores differ by", True: "summed exactly, the draws are off by"}
    return "; ".join(f"{told[exact]} {value:.0e}" for exact, value in sorted(apart.items()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of real items; random ones without")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args()
    print(f"{machine()}; d = 256, 4 layers, {VOCABULARY} words, mc_num {MC_NUM}, batch {given.batch_size}")
    for family in ("llada", "dream"):
        model = model_of(family)
        predict, full = MaskPredictor(model), FullLogits(model)
        noise = NOISES[model.likelihood_noise]
        suffix = (VOCABULARY - 2,) if noise.append_eos else ()
        for kind in ("one token", "several"):
            requests = likelihood_requests(kind, given.data, given.requests, suffix)
            estimator = LikelihoodEstimator(noise, MC_NUM, batch_size=BatchSize(given.batch_size))
            timed(
                f"{family} likelihood, {kind}",
                len(requests),
                lambda f=full, r=requests: [plain_score(f, request) for request in r],
                lambda p=predict, e=estimator, r=requests: e.score(p, r),
                lambda found, expected, r=requests: largest(r, found, expected),
            )
        generation(family, predict, full, given)


def generation(family: str, predict: MaskPredictor, full: MaskPredictor, given: argparse.Namespace) -> None:
    """Compare generation, by blocks (LLaDA) and over the whole answer."""
    length = given.gen_length
    samplers: dict[str, Any] = {"whole answer": DreamSampler(steps=length, max_new_tokens=length)}
    if family == "llada":
        blocks = (16, 32, length)
        samplers = {f"blocks of {b}": LLaDASampler(steps=length, gen_length=length, block_length=b) for b in blocks}
    prompts, draw = prompts_of(given.data, given.requests), random.Random(1)
    ends = [draw.randrange(20, 61) for _ in prompts]
    for name, sampler in samplers.items():

        def ours(sampler: Any = sampler) -> list[list[int]]:
            def settled(index: int, known: list[int]) -> bool:
                return len(known) >= ends[index]

            found = dict(
                generate_many(predict, prompts, sampler, batch_size=BatchSize(given.batch_size), settled=settled)
            )
            return [found[i][: ends[i]] for i in range(len(prompts))]

        def plain(sampler: Any = sampler) -> list[list[int]]:
            return [plain_answer(full, prompt, sampler)[:end] for prompt, end in zip(prompts, ends, strict=True)]

        timed(
            f"{family} generation, {length} tokens, {name}",
            len(prompts),
            plain,
            ours,
            lambda a, b: (
                "same tokens" if a == b else f"{sum(x != y for x, y in zip(a, b, strict=True))} answers differ"
            ),
        )


if __name__ == "__main__":
    main()
