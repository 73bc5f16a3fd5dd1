"""Block diffusion with keys and values of committed blocks kept, against passes over the whole prefix.

    .venv/bin/python benchmarks/block_generation.py

Random models of the sizes of `tests/golden/{sdar_gqa,llada2_moe_a}`, one prompt of one block, eight blocks of answer,
greedy, one thread. CPU seconds (of the process: other work on the machine does not count), with and without in turn,
medians; tokens must be equal. Both take as many passes: the first over a block keeps the one before it as well. A pass
of so few tokens is mostly the overhead of its operations, which both have: the gain grows with the block. `--kv` rounds
keys and values to 4 bits, at read and at commit.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from measure import machine
from torch import Tensor

from starquant.config.bits import FULL_PRECISION, AttentionSpec
from starquant.diffusion import LLaDA2Sampler, LLaDA21Sampler, SDARSampler, generate
from starquant.diffusion.samplers import BlockSampler
from starquant.models.base import MaskedDiffusionModel
from starquant.models.llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from starquant.models.sdar import SDARConfig, SDARForCausalLM
from starquant.quantized.install import install

BLOCKS, MASK = 8, 300
NEVER = 2**20  # an end-of-text that no model has


def sdar() -> MaskedDiffusionModel:
    """A random SDAR of the golden model's size."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"head_dim": 32, "intermediate_size": 200, "vocab_size": 320, "max_position_embeddings": 512}
    return SDARForCausalLM(SDARConfig(**sizes | more, mask_token_id=MASK, initializer_range=0.15)).eval()


def llada2() -> MaskedDiffusionModel:
    """A random LLaDA2 of the golden model's size."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"head_dim": 32, "intermediate_size": 144, "moe_intermediate_size": 40, "vocab_size": 400}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "mask_token_id": MASK}
    return LLaDA2MoeModelLM(LLaDA2MoeConfig(**sizes | more | experts, initializer_range=0.15)).eval()


def sampler_of(kind: str, block: int, cache: bool) -> BlockSampler:
    """Return a sampler of eight blocks that ends early nowhere."""
    length = BLOCKS * block
    if kind == "sdar":
        return SDARSampler(length, block, cache=cache, steps_per_block=block, stop_ids=())
    if kind == "llada2":
        return LLaDA2Sampler(length, block, cache=cache, steps_per_block=block, threshold=1.0, eos_id=NEVER)
    return LLaDA21Sampler(length, block, cache=cache, threshold=0.7, editing_threshold=0.5, max_post_steps=2)


def seconds(model: MaskedDiffusionModel, kind: str, block: int, repeats: int) -> dict[bool, float]:
    """Return the CPU seconds of a generation with (True) and without kept keys; raises SystemExit for other tokens."""
    prompt = torch.randint(0, MASK, (1, block), generator=torch.Generator().manual_seed(1))
    times: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(repeats + 1):
        made: list[Tensor] = []
        for cache in times:
            began = time.process_time()
            made.append(generate(model, prompt, sampler_of(kind, block, cache)))
            if repeat:  # the first warms up
                times[cache].append(time.process_time() - began)
        if not torch.equal(*made):
            raise SystemExit(f"error: {kind}, blocks of {block}: other tokens with kept keys")
    return {cache: statistics.median(durations) for cache, durations in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a model and block length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32], help="tokens of a block")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kv", action="store_true", help="keys and values at 4 bits, at read and at commit")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(machine())
    cases = itertools.product(("sdar", "llada2", "llada2_1"), ("read", "commit") if options.kv else ("read",))
    for kind, at in cases:
        model = sdar() if kind == "sdar" else llada2()
        if options.kv:
            attention = AttentionSpec.model_validate({"k": 4, "v": 4, "kv_at": at})
            install(model, FULL_PRECISION.model_copy(update={"attention": attention}))
        for block in options.blocks:
            took = seconds(model, kind, block, options.repeats)
            rounded = f", K and V at 4 bits at {at}" if options.kv else ""
            print(
                f"{kind}, {BLOCKS} blocks of {block}{rounded}: {took[True]:.3f} s with kept keys, {took[False]:.3f} s "
                f"without, {took[False] / took[True]:.2f}x"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
