"""Evaluation: our default against a plain re-implementation of the official loops, same model, items and draws.

The plain loop takes one request at a time: 128 Monte-Carlo copies in batches of 32 with the logits of every position
(likelihood), every denoising step of a batch of one with the logits of every position (generation). Scores and tokens
are compared. Models are random, LLaDA- and Dream-shaped; items are JSONL files (`--data`, the layout of
docs/offline-data.md), their words hashed to token ids, else random ids of like lengths.

A random model does not end its answers: an answer counts as ended after 20 to 60 tokens, as if EOS stood there.

    python benchmarks/evaluation.py --data DATA                          the default, small models, CPU
    python benchmarks/evaluation.py --vary batch-size 1 8 32 128         ours alone, one setting varied (also requests,
                                                                         gen-length), with peak memory
    python benchmarks/evaluation.py --approximate                        approximate generation beside the exact one
    python benchmarks/evaluation.py --shape 8b --device cuda --hours     LLaDA-8B and Dream-7B shapes in bfloat16, and
                                                                         GPU-hours for the nine tasks
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import PeakMemory, machine
from torch import Tensor

from starquant.diffusion import (
    BatchSize,
    DreamSampler,
    LikelihoodEstimator,
    LLaDASampler,
    MaskPredictor,
    ScoreRequest,
    generate_approximately,
    generate_many,
)
from starquant.diffusion.masking import seeded_generator
from starquant.diffusion.samplers import DenoisingState
from starquant.models import family_of
from starquant.models.base import MaskedDiffusionModel
from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM

if TYPE_CHECKING:
    from starquant.config.speed import SpeedSpec

VOCABULARY, MC_NUM, COPIES = 32_000, 128, 32


def model_of(family: str, shape: str = "small", device: str = "cpu", layers: int | None = None) -> MaskedDiffusionModel:
    """Return a random model: d = 256, 4 layers, 32,000 words in float32, or the published shape in bfloat16.

    `layers` other than None are so many blocks instead.
    """
    torch.manual_seed(0)
    special = {"mask_token_id": VOCABULARY - 1, "eos_token_id": VOCABULARY - 2}
    sizes: dict[str, Any]
    if family == "llada":
        sizes = {"d_model": 256, "n_heads": 4, "n_layers": 4, "mlp_hidden_size": 768, "vocab_size": VOCABULARY}
        whole = {"mlp_hidden_size": 12288, "eos_token_id": 126081}
        fewer = {} if layers is None else {"n_layers": layers}
        config: Any = LLaDAConfig(**(sizes | special if shape == "small" else whole) | fewer)
        kind: Any = LLaDAModelLM
    else:
        sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
        sizes |= {"intermediate_size": 768, "vocab_size": VOCABULARY, "pad_token_id": VOCABULARY - 2}
        fewer = {} if layers is None else {"num_hidden_layers": layers}
        whole = {"num_key_value_heads": 4}  # the other published sizes are the configuration's own defaults
        config, kind = DreamConfig(**(sizes | special if shape == "small" else whole) | fewer), DreamModel
    torch.set_default_dtype(torch.float32 if shape == "small" else torch.bfloat16)
    try:
        with torch.device(device):
            model: MaskedDiffusionModel = kind(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return model


class FullLogits(MaskPredictor):
    """Computes the logits of every position, then takes those asked for."""

    @torch.inference_mode()
    def chunks(  # noqa: D102
        self, ids_BL: Tensor, positions: tuple[Tensor, Tensor], *, visible_BL: Tensor | None = None, **_: object
    ) -> Iterator[tuple[slice, Tensor]]:
        rows, columns = positions
        logits: Tensor = self.model(input_ids=ids_BL, attention_mask=visible_BL).logits.float()
        yield slice(None), logits[rows, self.source_columns(rows, columns, visible_BL)]


def enumerated(request: ScoreRequest) -> bool:
    """Return whether ours sums over all mask patterns, so that the plain loop's draws only estimate its score."""
    return len(request.target) == 1 or 2 ** len(request.target) - 1 <= MC_NUM


def reference_score(predict: MaskPredictor, request: ScoreRequest) -> float:
    """One request: all its draws, 32 copies a pass."""
    noise = family_of(predict.model).noise
    generator = seeded_generator(0, "likelihood", request.prompt, request.target)
    patterns = noise.draw(len(request.target), MC_NUM, generator)
    start, total = len(request.prompt), 0.0
    for masked_RT, weight_R in zip(patterns.masked_RT.split(COPIES), patterns.weight_R.split(COPIES), strict=True):
        masked_RT, weight_R = masked_RT.to(predict.device), weight_R.to(predict.device)
        ids = torch.tensor([request.prompt + request.target + request.suffix]).repeat(len(masked_RT), 1)
        ids = ids.to(predict.device)
        answer = ids[:, start : start + len(request.target)]
        target = answer.clone()
        answer[masked_RT] = predict.mask_id
        rows, columns = masked_RT.nonzero(as_tuple=True)
        log_probs = predict(ids, (rows, columns + start)).log_softmax(1)
        log_probs_N = log_probs.gather(1, target[rows, columns][:, None])[:, 0].double()
        total += float((log_probs_N * weight_R[rows]).sum())
    return total


def reference_answer(predict: MaskPredictor, prompt: Sequence[int], sampler: LLaDASampler | DreamSampler) -> list[int]:
    """One request: every step of the whole answer."""
    ids = torch.tensor([[*prompt, *[predict.mask_id] * sampler.answer_length]]).to(predict.device)
    state = DenoisingState(ids, len(prompt), None, [seeded_generator(0, "generation", tuple(prompt))])
    with torch.inference_mode():
        sampler.denoise(predict, state)
    return ids[0, len(prompt) :].tolist()


def words(text: str) -> tuple[int, ...]:
    """Return a token id a word."""
    return tuple(zlib.crc32(word.encode()) % (VOCABULARY - 10) for word in text.split())


def likelihood_requests(kind: str, data: Path | None, count: int, suffix: tuple[int, ...]) -> list[ScoreRequest]:
    """Return requests of multiple-choice items, four choices each: "one token" or "several"."""
    requests: list[ScoreRequest] = []
    for index in range(-(-count // 4)):
        context, choices = _item(kind, data, index)
        requests += [ScoreRequest(context, choice, suffix) for choice in choices]
    return requests[:count]


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


@dataclass(frozen=True)
class Timed:
    """Seconds of the plain loop (the reference) and of ours, for so many requests."""

    reference: float
    own: float
    requests: int


def timed(name: str, count: int, reference: Any, own: Any, same: Any) -> Timed:
    """Run both once each (they take many passes), ours first and last; print seconds, ratio, and whether they agree."""
    first, result = seconds(own)
    slow, expected = seconds(reference)
    fast = min(first, seconds(own)[0])
    ratio = f"plain {slow:7.2f} s, ours {fast:6.2f} s: {slow / fast:6.1f}x"
    print(f"{name:44s} {ratio}  ({count} requests; {same(result, expected)})", flush=True)
    return Timed(slow, fast, count)


def seconds(work: Any) -> tuple[float, Any]:
    """Return how long a call takes, and what it returns."""
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def largest(requests: Sequence[ScoreRequest], scores: Sequence[float], expected: Sequence[float]) -> str:
    """Say how far scores lie apart, relative to their size; of enumerated targets, how far the draws are off."""
    apart: dict[bool, float] = {}
    for request, a, b in zip(requests, scores, expected, strict=True):
        exact = enumerated(request)
        apart[exact] = max(apart.get(exact, 0.0), abs(a - b) / max(1.0, abs(b)))
    phrases = {False: "same draws, scores differ by", True: "summed exactly, the draws are off by"}
    return "; ".join(f"{phrases[exact]} {value:.0e}" for exact, value in sorted(apart.items()))


class Bench:
    """One model with its requests."""

    def __init__(self, family: str, arguments: argparse.Namespace) -> None:
        self.family, self.arguments = family, arguments
        model = model_of(family, arguments.shape, arguments.device)
        self.predict, self.full = MaskPredictor(model), FullLogits(model)
        self.noise = family_of(model).noise
        self.suffix = (int(model.config.eos_token_id),) if self.noise.append_eos else ()

    def size(self) -> BatchSize:
        """Return the batch size asked for."""
        return BatchSize.of(self.arguments.batch_size, self.predict.model)

    def likelihood(self, kind: str) -> tuple[list[ScoreRequest], Any]:
        """Return requests, and our way to score them."""
        requests = likelihood_requests(kind, self.arguments.data, self.arguments.requests, self.suffix)
        estimator = LikelihoodEstimator(self.noise, MC_NUM, batch_size=self.size())
        return requests, lambda: estimator.score(self.predict, requests)

    def samplers(self) -> dict[str, Any]:
        """Return samplers by name: by blocks (LLaDA) and over the whole answer."""
        length = self.arguments.gen_length
        if self.family == "dream":
            return {"whole answer": DreamSampler(steps=length, max_new_tokens=length)}
        sizes = {f"blocks of {b}": b for b in (16, 32)} | {"whole answer": length}
        return {name: LLaDASampler(steps=length, gen_length=length, block_length=b) for name, b in sizes.items()}

    def generation(self, sampler: Any, speed: SpeedSpec | None = None) -> tuple[Any, Any]:
        """Return the plain way to answer, and ours."""
        prompts, draw = prompts_of(self.arguments.data, self.arguments.requests), random.Random(1)
        ends = [draw.randrange(20, 61) for _ in prompts]

        def settled(index: int, known: list[int]) -> bool:
            return len(known) >= ends[index]

        def own() -> list[list[int]]:
            how: dict[str, Any] = {"batch_size": self.size(), "settled": settled}
            if speed is None:
                answers = dict(generate_many(self.predict, prompts, sampler, **how))
            else:
                answers = dict(generate_approximately(self.predict, prompts, sampler, speed, **how))
            return [answers[i][: ends[i]] for i in range(len(prompts))]

        def reference() -> list[list[int]]:
            return [reference_answer(self.full, p, sampler)[:end] for p, end in zip(prompts, ends, strict=True)]

        return reference, own


def compare(bench: Bench) -> dict[str, Timed]:
    """Time everything against the plain loops; returns seconds by kind."""
    times = {}
    for kind in ("one token", "several"):
        requests, own = bench.likelihood(kind)
        times[kind] = timed(
            f"{bench.family} likelihood, {kind}",
            len(requests),
            lambda r=requests: [reference_score(bench.full, request) for request in r],
            own,
            lambda a, b, r=requests: largest(r, a, b),
        )
    for name, sampler in bench.samplers().items():
        reference, own = bench.generation(sampler)
        title = f"{bench.family} generation, {bench.arguments.gen_length} tokens, {name}"
        times[name] = timed(title, bench.arguments.requests, reference, own, _agreement)
    return times


def _agreement(answers: Sequence[Any], expected: Sequence[Any]) -> str:
    apart = sum(x != y for x, y in zip(answers, expected, strict=True))
    return f"{apart} answers differ" if apart else "same tokens"


def approximate(bench: Bench) -> None:
    """Time approximate generation beside the exact one, blocks of 32. A random model is sure of nothing, so that
    each step commits one token: what is timed is a step, and no quality."""
    from starquant.config.speed import SpeedSpec  # pydantic, which the rest of this file does without

    sampler = bench.samplers().get("blocks of 32") or bench.samplers()["whole answer"]
    exact_seconds, exact = seconds(bench.generation(sampler)[1])
    print(f"{bench.family} exact{'':26s} {exact_seconds:6.2f} s")
    for kv_cache in ("none", "prefix", "dual"):
        speed = SpeedSpec(kv_cache=kv_cache, confidence_threshold=1.0, block_length=32)
        took, answers = seconds(bench.generation(sampler, speed)[1])
        agreement = _agreement(answers, exact)
        ratio = f"{took:6.2f} s: {exact_seconds / took:5.1f}x"
        print(f"{bench.family} approximate, KV cache {kv_cache:8s} {ratio} ({agreement})")


def vary(bench: Bench, setting: str, settings: Sequence[int]) -> None:
    """Time ours with one setting varied, and its peak memory."""
    for value in settings:
        setattr(bench.arguments, setting.replace("-", "_"), value)
        works = {f"likelihood, {kind}": bench.likelihood(kind)[1] for kind in ("one token", "several")}
        works |= {f"generation, {name}": bench.generation(s)[1] for name, s in bench.samplers().items()}
        for name, work in works.items():
            with PeakMemory(bench.arguments.device) as peak:
                took, _ = seconds(work)
            each = 1000 * took / bench.arguments.requests
            print(
                f"{bench.family} {setting} {value:5d}  {name:30s} {each:9.1f} ms a request, peak +{peak.mib:6.0f} MiB"
            )


#: Requests of the nine tasks: (items) x (choices), by kind. Published sizes of the test sets.
NINE = {
    "one token": {"mmlu": 14042 * 4, "ceval-valid": 1346 * 4, "winogrande": 1267 * 2},
    "several": {"truthfulqa_mc2": 5882, "arc_challenge": 1172 * 4, "hellaswag": 10042 * 4, "piqa": 1838 * 2},
    "whole answer": {"humaneval": 164, "gsm8k": 1319},
}


def hours(times: dict[str, Timed]) -> None:
    """Print hours for the nine tasks at the lengths that were timed: without few-shot examples and guidance."""
    for kind, tasks in NINE.items():
        count, one = sum(tasks.values()), times[kind]
        reference, own = (count * s / one.requests / 3600 for s in (one.reference, one.own))
        print(f"  {', '.join(tasks):50s} {count:6d} requests: plain {reference:7.1f} h, ours {own:7.1f} h")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of real items; random ones without")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--batch-size", default="auto", help="a number, or auto")
    parser.add_argument("--families", nargs="+", default=["llada", "dream"], choices=["llada", "dream"])
    parser.add_argument("--shape", default="small", choices=["small", "8b"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vary", nargs="+", metavar="SETTING VALUE ...", help="batch-size, requests or gen-length")
    parser.add_argument("--approximate", action="store_true")
    parser.add_argument("--hours", action="store_true", help="estimate the nine tasks")
    arguments = parser.parse_args()
    shape = f"d = 256, 4 layers, {VOCABULARY} words" if arguments.shape == "small" else "published shapes, bfloat16"
    print(f"{machine()}; {arguments.device}; {shape}, mc_num {MC_NUM}, batch {arguments.batch_size}")
    for family in arguments.families:
        bench = Bench(family, arguments)
        if arguments.vary:
            vary(bench, arguments.vary[0], [int(value) for value in arguments.vary[1:]])
        elif arguments.approximate:
            approximate(bench)
        else:
            times = compare(bench)
            if arguments.hours:
                hours(times)


if __name__ == "__main__":
    main()
