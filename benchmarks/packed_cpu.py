"""A packed model on a CPU against bf16: time and private memory of one block of LLaDA-8B's shapes, and of its head.

Weights are random (`packed_models.py` says what stands in front of the linears). Forwards of both alternate in one
process, so that what else the machine does falls on both. Times are the least of the repeats: processor time (of all
threads), which other processes disturb less, and wall time. "whole" is the ratio for 32 blocks and the head at
`--read` positions. Private memory (RssAnon, Linux) is the peak of a packed forward above what the process holds else.
It needs 4 GB.

    python benchmarks/packed_cpu.py                                    W4A4, 16 to 1,024 tokens, one thread
    python benchmarks/packed_cpu.py --precisions w4a4 w8a8 w4a16 --paths values integers --threads 2
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from measure import PeakMemory, machine
from packed_models import VARIANTS, build

from starquant.diffusion import MaskPredictor
from starquant.models.base import MaskedDiffusionModel
from starquant.packed.description import use_integers
from starquant.session.freed_memory import return_freed

BLOCKS = 32  # of the whole model


def least(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Return the least processor and wall milliseconds of each, run in turn after one round of warm-up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            processor, wall = time.process_time(), time.perf_counter()
            work()
            times[name].append((time.process_time() - processor, time.perf_counter() - wall))
    return {
        name: (1e3 * min(p for p, _ in taken[1:]), 1e3 * min(w for _, w in taken[1:])) for name, taken in times.items()
    }


def block_work(model: MaskedDiffusionModel, tokens: int) -> Callable[[], object]:
    """Return a forward of embedding and block; half of the tokens are masked."""
    ids = torch.randint(3, 1000, (1, tokens))
    ids[:, tokens // 2 :] = model.mask_token_id
    return lambda: model(ids, project=False)


def head_work(model: MaskedDiffusionModel, read: int) -> Callable[[], object]:
    """Return what a sampler asks of norm and head: logits at some positions, chunk by chunk."""
    hidden = torch.randn(1, read, model.config.hidden_size).to(next(model.parameters()).dtype)
    predict = MaskPredictor(model)
    predict._encode = lambda *_: hidden  # type: ignore[method-assign]  # without the block
    ids, rows = torch.full((1, read), model.mask_token_id), torch.zeros(read, dtype=torch.long)
    return lambda: [logits_NV.argmax(1) for _, logits_NV in predict.chunks(ids, (rows, torch.arange(read)))]


def ratio(times: dict[str, tuple[float, float]]) -> str:
    """Return milliseconds and their ratio in words: processor (wall)."""
    (p, p_wall), (f, f_wall) = times["packed"], times["bf16"]
    return f"{p:6.0f} ({p_wall:6.0f}) / {f:6.0f} ({f_wall:6.0f}) = {p / f:5.2f} ({p_wall / f_wall:5.2f})"


def peak(work: Callable[[], object]) -> float:
    """Return the private MiB that a call needs, memory that is free but was not returned to the system included."""
    return_freed()
    with PeakMemory(private=True) as memory:
        work()
    return memory.mib


@torch.inference_mode()
def compare(name: str, path: str, full: MaskedDiffusionModel, arguments: argparse.Namespace) -> None:
    """Print a precision beside bf16."""
    packed = build("llada", "8b", name, "cpu", arguments.ends, layers=1)
    use_integers(packed, "always" if path == "integers" else "never")
    models = {"packed": packed, "bf16": full}
    works = {key: head_work(model, arguments.read) for key, model in models.items()}
    head = least(works, arguments.repeats)
    print(f"{name}, {path}: ms packed / bf16, processor (wall); private MiB")
    print(
        f"  head, {arguments.ends} bits, {arguments.read} positions {ratio(head)}; {peak(works['packed']):4.0f} MiB",
        flush=True,
    )
    for tokens in arguments.tokens:
        works = {key: block_work(model, tokens) for key, model in models.items()}
        block = least(works, arguments.repeats)
        packed_ms, full_ms = (BLOCKS * block[key][0] + head[key][0] for key in models)
        print(
            f"  block, {tokens:5d} tokens {ratio(block)}; {peak(works['packed']):4.0f} MiB; "
            f"whole {packed_ms / full_ms:.2f}",
            flush=True,
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--precisions", nargs="+", default=["w4a4-plain", "w4a4"], choices=sorted(set(VARIANTS) - {"bf16"})
    )
    parser.add_argument("--paths", nargs="+", default=["values"], choices=["values", "integers"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 128, 512, 1024])
    parser.add_argument("--read", type=int, default=256, help="positions whose logits are read (256)")
    parser.add_argument("--ends", type=int, default=8, choices=[4, 8, 16], help="bits of embedding and head (8)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine())
    full = build("llada", "8b", "bf16", "cpu", layers=1)
    for name, path in itertools.product(arguments.precisions, arguments.paths):
        if path == "values" or VARIANTS[name].inputs < 16:
            compare(name, path, full, arguments)


if __name__ == "__main__":
    main()
