"""Latency, tokens/s, memory and parts of 8B-shaped models: bf16 against W4A4, W8A8, W4A16 (the paper's table 4).

Weights and codes are random (`packed_models.py` says what stands where). Every forward is timed launched by Python
(eager), replayed as a CUDA graph, and replayed after torch.compile has fused what lies between the products; the table
takes the least of these, for bf16 and the quantized models alike.

    python run.py experiment=table4_efficiency                                                     the table, on a GPU
    python benchmarks/efficiency.py --device cuda --out results/published/efficiency/NAME.json     the same, into a file
    python benchmarks/efficiency.py --shape small                                                  a CPU: does it run?
    python benchmarks/efficiency.py --predict H100                                                 what it should take
    python -m starquant.reports.efficiency results/published/efficiency                             the table of files

Rows that the file holds already are not measured again: stop it whenever you like. Nothing but torch, transformers and
this package is needed (Triton for the kernels); for the first command all of its requirements.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from evaluation import VOCABULARY
from kept_rows import Results
from measure import PeakMemory, by_kernel, energy_meter, joules
from packed_models import VARIANTS, build
from prediction import CARDS, report
from torch import nn

from starquant.diffusion import LLaDASampler, generate
from starquant.diffusion.samplers import DreamSampler
from starquant.kernels.dispatch import HAS_TRITON, validate_tensor_cores
from starquant.kernels.tuning.measuring import gpu_milliseconds
from starquant.models.base import MaskedDiffusionModel
from starquant.models.cuda_graphs import capture, compiled_blocks, replayed
from starquant.models.layers import AttentionCore, InputSite
from starquant.quantized.packed_linear import PackedLinear

LENGTHS, BATCHES = (16, 128, 512, 1024, 2048, 4096), (1,)
PRECISIONS = ("bf16", "w4a4-plain", "w4a4-quarot", "w4a4", "w4a4-plus", "w8a8", "w4a16")
LAUNCHES = ("eager", "graph", "compiled")
PREDICTED = 8  # a block of 8 is read by the head
SMALL = 100  # kernels of a graph that measures what a launch takes
ANSWER = 128  # tokens of a generated answer, and of its prompt
ROUNDS = 5  # that a GPU is given at once


def clock(work: Callable[[], object], device: str, seconds: float = 0.5) -> float:
    """Return the median milliseconds of a call, after warm-up; device events on a GPU."""
    on_gpu, times, began = device != "cpu", list[float](), time.perf_counter()
    for _ in range(3 if on_gpu else 1):
        work()
    while len(times) < 3 or (time.perf_counter() - began < seconds and len(times) < 200):
        if on_gpu:
            times += gpu_milliseconds(work, ROUNDS)
        else:
            at = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - at))
    return statistics.median(times)


def parts(model: MaskedDiffusionModel, forward: Callable[[], object]) -> dict[str, float]:
    """Return milliseconds by part of one forward on a CPU, measured around modules.

    Sites hold transforms, gates and TAC; what they cost is the difference to `w4a4-plain`.
    """
    kinds: list[tuple[str, Callable[[nn.Module], bool]]] = [
        ("head", lambda m: m is model.trunk().head),
        ("gemm", lambda m: isinstance(m, PackedLinear | nn.Linear)),
        ("quantization", lambda m: isinstance(m, InputSite)),
        ("attention", lambda m: isinstance(m, AttentionCore)),
    ]
    milliseconds = dict.fromkeys(("whole", *(name for name, _ in kinds)), 0.0)
    open_spans, handles = list[float](), []

    def enter(*_: object) -> None:
        open_spans.append(time.perf_counter())

    def leave(*_: object, kind: str) -> None:
        milliseconds[kind] += 1000 * (time.perf_counter() - open_spans.pop())

    for module in model.modules():
        kind = next((name for name, belongs in kinds if belongs(module)), None)
        if kind is not None:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(functools.partial(leave, kind=kind)))
    enter()
    forward()
    leave(kind="whole")
    for handle in handles:
        handle.remove()
    milliseconds["rest"] = 2 * milliseconds["whole"] - sum(milliseconds.values())
    return {name: round(value, 4) for name, value in milliseconds.items()}


def kernels_of(forward: Callable[[], object]) -> dict[str, float]:
    """Return the milliseconds of a forward's kernels by part (`by_kernel`), each launched when the last has ended."""
    if not HAS_TRITON:
        return by_kernel(capture(forward))
    from starquant.kernels.triton.launch import one_after_another

    with one_after_another():
        return by_kernel(capture(forward))


def ceilings(device: str) -> dict[str, float]:
    """Measure what the device can do: bf16 and int8 products (operations/s), a copy (bytes/s), a launch (s).

    The latter is that of a kernel in a graph which does next to nothing.
    """
    n = 8192 if device != "cpu" else 512
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    rates = {"bf16": 2e3 * n**3 / clock(lambda: a @ a, device)}
    if device != "cpu":
        i = torch.randint(-8, 8, (n, n), device=device, dtype=torch.int8)
        rates["int8"] = 2e3 * n**3 / clock(lambda: torch._int_mm(i, i.T), device)
    rates["bytes"] = 2e3 * a.nbytes / clock(lambda: a.clone(), device)
    if device != "cpu":
        one = torch.zeros(1, device=device)
        rates["launch"] = clock(capture(lambda: [one.add_(1) for _ in range(SMALL)]), device) / 1e3 / SMALL
    return rates


def stored(module: nn.Module) -> int:
    """Return the bytes of a module's tensors."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def counted(model: MaskedDiffusionModel, rows: int, length: int) -> dict[str, float]:
    """Return operations of the block linears, attention and head, and bytes of the weights that a forward reads."""
    config, tokens, trunk = model.config, rows * length, model.trunk()
    linears = [m for m in model.modules() if isinstance(m, PackedLinear | nn.Linear) and m is not trunk.head]
    width, head = config.hidden_size, trunk.head
    assert head is not None
    return {
        "linear_operations": 2.0 * tokens * sum(m.in_features * m.out_features for m in linears),
        "attention_operations": 4.0 * tokens * length * width * config.num_hidden_layers,
        "head_operations": 2.0 * PREDICTED * rows * width * trunk.embedding.num_embeddings,
        "weight_bytes": float(sum(map(stored, linears)) + stored(head)),
    }


def bound_ms(count: dict[str, float], ceiling: dict[str, float], integer: bool) -> float:
    """Return the roofline: the longer of reading the weights and doing the operations."""
    fast = ceiling.get("int8", ceiling["bf16"]) if integer else ceiling["bf16"]
    rest = count["attention_operations"] + count["head_operations"]
    return 1000 * max(
        count["weight_bytes"] / ceiling["bytes"], count["linear_operations"] / fast + rest / ceiling["bf16"]
    )


def forward_row(
    model: MaskedDiffusionModel, row: dict[str, Any], arguments: argparse.Namespace, ceiling: dict[str, float]
) -> dict[str, Any]:
    """Measure the forward of a batch and length under one launch."""
    rows, length, device = row["batch"], row["tokens"], arguments.device
    ids = torch.randint(0, VOCABULARY - 10, (rows, length), device=device)
    ids[:, -PREDICTED:] = int(model.config.mask_token_id)
    positions = (ids == model.mask_token_id).nonzero(as_tuple=True)
    forward = functools.partial(model, input_ids=ids, logit_positions=positions)
    forward()  # what is compiled and set up once is not the forward's
    with PeakMemory(device) as peak:
        forward()
    work = forward if row["launch"] == "eager" or device == "cpu" else capture(forward)
    took, count = clock(work, device, arguments.seconds), counted(model, rows, length)
    bound = bound_ms(count, ceiling, VARIANTS[row["precision"]].inputs < 16)
    timing = {"ms": took, "activation_mib": peak.mib, "tokens_per_s": 1000 * rows * length / took}
    split: dict[str, float] = {}  # of a graph where blocks are compiled: a profile takes its time
    if device == "cpu":
        split = parts(model, forward)
    elif row["launch"] != "graph":
        split = kernels_of(forward)
    energy = joules(lambda: (work(), torch.cuda.synchronize()), energy_meter(device), 2 * arguments.seconds)
    return timing | {"joules": energy, "roofline_ms": bound, "of_roofline": bound / took, "parts_ms": split} | count


def generation_row(model: MaskedDiffusionModel, row: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure an answer end to end: a token a step, in blocks of 8 where the family has them."""
    size = row["tokens"]
    sampler: Any = DreamSampler(size, size) if row["model"] == "dream" else LLaDASampler(size, size, PREDICTED)
    prompt = torch.randint(0, VOCABULARY - 10, (1, size))
    with replayed(model, row["launch"] != "eager" and arguments.device != "cpu"):
        generate(model, prompt, sampler)
        began = time.perf_counter()
        generate(model, prompt, sampler)
        took = 1000 * (time.perf_counter() - began)
    return {"ms": took, "tokens_per_s": 1000 * size / took}


def rows_of(family: str, precision: str, launch: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what is to be measured of a model under a launch: a row a batch and length, and one of generation."""
    size = ANSWER if arguments.shape == "8b" else PREDICTED
    cases = [("forward", b, n) for n, b in itertools.product(arguments.lengths, arguments.batches)]
    cases += [("generation", 1, size)] if arguments.generation else []
    same = {"model": family, "shape": arguments.shape, "precision": precision, "ends": arguments.ends, "launch": launch}
    return [same | {"kind": kind, "batch": batch, "tokens": tokens} for kind, batch, tokens in cases]


@torch.inference_mode()
def measure(family: str, precision: str, arguments: argparse.Namespace, file: Results) -> Iterator[dict[str, Any]]:
    """Yield rows that the file does not hold, with an `error` where one failed; blocks are compiled once."""
    todo = {launch: rows_of(family, precision, launch, arguments) for launch in arguments.launches}
    todo = {launch: [row for row in rows if not file.holds(row)] for launch, rows in todo.items()}
    if not any(todo.values()):
        return
    model = build(family, arguments.shape, precision, arguments.device, arguments.ends)
    size = {"resident_bytes": stored(model)}
    for launch, rows in todo.items():
        with compiled_blocks(model, launch == "compiled" and bool(rows)):
            for row in rows:
                try:
                    timing = (
                        forward_row(model, row, arguments, file.ceilings)
                        if row["kind"] == "forward"
                        else generation_row(model, row, arguments)
                    )
                except Exception as error:  # another launch, another size may work
                    reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
                    print(f"  {launch} {row['kind']} {row['batch']} x {row['tokens']}: {reason}", file=sys.stderr)
                    yield row | {"error": reason}
                else:
                    yield row | size | timing
                if arguments.device != "cpu":
                    torch.cuda.empty_cache()  # a graph held the memory that it was captured with


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="8b", choices=["small", "8b"])
    parser.add_argument("--families", nargs="+", default=["llada", "dream"], choices=["llada", "dream"])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(VARIANTS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, help="default: graph, compiled; on a CPU eager")
    parser.add_argument("--ends", type=int, default=8, choices=[4, 8, 16], help="bits of embedding and head (8)")
    parser.add_argument("--no-generation", dest="generation", action="store_false", help="forwards only")
    parser.add_argument("--seconds", type=float, default=0.5, help="that each forward is repeated for; energy twice")
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    parser.add_argument("--predict", choices=list(CARDS), help="measure nothing: print what a card should take")
    arguments = parser.parse_args()
    if arguments.predict is not None:
        print(report(arguments.predict))
        return
    arguments.launches = arguments.launches or (LAUNCHES[1:] if arguments.device != "cpu" else ("eager",))
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"error: --device {arguments.device}: there is no GPU here")
    validate_tensor_cores(torch.device(arguments.device))
    with torch.cuda.device(arguments.device) if arguments.device != "cpu" else nullcontext():  # streams, graphs, events
        raise SystemExit(measure_all(arguments))


def measure_all(arguments: argparse.Namespace) -> int:
    """Measure what the file does not hold, and print it; returns 1 where something could not be measured."""
    name = torch.cuda.get_device_name(arguments.device) if arguments.device != "cpu" else platform.processor() or "cpu"
    file = Results(arguments.out, name, ceilings(arguments.device))
    print(f"{name}, torch {torch.__version__}, triton {'yes' if HAS_TRITON else 'no'}; {file.ceilings}", flush=True)
    failed = 0
    for family, precision in itertools.product(arguments.families, arguments.precisions):
        for row in measure(family, precision, arguments, file):
            if "error" in row:
                failed += 1
                continue
            file.add(row)
            figures = (
                f"{row['ms']:9.2f} ms {row['tokens_per_s']:10.0f} tokens/s {row['resident_bytes'] / 2**30:6.2f} GiB"
            )
            of = f" {row['of_roofline']:.2f} of the roofline {row['parts_ms'] or ''}" if "of_roofline" in row else ""
            what = (
                f"{family} {precision:13s} {row['launch']:8s} {row['kind']:10s} {row['batch']:3d} x {row['tokens']:5d}"
            )
            print(what, figures + of, flush=True)
    if failed:
        print(f"error: {failed} rows could not be measured (above)", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    main()
