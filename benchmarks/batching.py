"""Requests per second of likelihood and generation by batch size, on the embedded model; scores and tokens compared."""

from __future__ import annotations

import argparse

import torch
from measure import alternate, machine

from starquant.diffusion import (
    BatchSize,
    LikelihoodEstimator,
    LLaDANoise,
    LLaDASampler,
    MaskPredictor,
    ScoreRequest,
    generate_many,
)
from starquant.evaluation.lm import DiffusionLM
from starquant.evaluation.testbed_tasks import items
from starquant.models import load_model, load_tokenizer
from starquant.protocol import LLaDASamplerSpec, TaskProtocol
from starquant.testbed.items import Split
from starquant.testbed.shipped import weights_folder


def main() -> None:
    """Print a line a kind of task: seconds at each batch size, ratio, whether the answers are the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model, tokenizer = load_model(weights_folder(0)), load_tokenizer(weights_folder(0))
    predict = MaskPredictor(model)
    print(f"{machine()}; {args.requests} requests; batch sizes {args.batch_sizes}")

    profiles = items("profiles", Split.VALIDATION)[: args.requests]
    encode = tokenizer.encode
    requests = [ScoreRequest(tuple(encode(i.prompt)), tuple(encode(" " + i.answer))) for i in profiles]
    scores: dict[str, list[float]] = {}

    def likelihood(size: int) -> None:
        scores[str(size)] = LikelihoodEstimator(LLaDANoise(), 16, batch_size=BatchSize(size)).score(predict, requests)

    medians = alternate({str(s): lambda s=s: likelihood(s) for s in args.batch_sizes}, args.repeats, warmup=1)
    largest = max(abs(a - b) for v in scores.values() for a, b in zip(v, scores[str(args.batch_sizes[0])], strict=True))
    report("likelihood, 16 draws of 8-token targets", medians, args.requests, f"largest score difference {largest:.1e}")

    problems = items("arithmetic", Split.VALIDATION)[: args.requests]
    sampler = LLaDASamplerSpec(name="llada", gen_length=8, steps=8, block_length=8)
    texts: dict[str, list[str]] = {}

    def generation(size: int) -> None:
        lm = DiffusionLM(model, tokenizer, TaskProtocol(sampler=sampler), batch_size=size, progress=False)
        prompts = [encode(p.prompt) for p in problems]
        settings = LLaDASampler(**sampler.model_dump(exclude={"name"}))
        answers = dict(generate_many(predict, prompts, settings, batch_size=BatchSize(size)))
        texts[str(size)] = [lm._text(answers[i], []) for i in range(len(prompts))]

    medians = alternate({str(s): lambda s=s: generation(s) for s in args.batch_sizes}, args.repeats, warmup=1)
    same = all(t == texts[str(args.batch_sizes[0])] for t in texts.values())
    report("generation, 8 tokens in 8 steps", medians, args.requests, f"same tokens: {same}")


def report(name: str, medians: dict[str, float], requests: int, note: str) -> None:
    """Print one line a batch size."""
    first = next(iter(medians.values()))
    for size, seconds in medians.items():
        print(f"{name:42s} batch {size:>3s}: {requests / seconds:8.1f} requests/s  {first / seconds:5.2f}x  {note}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
