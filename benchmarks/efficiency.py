"""Latency, tokens/s, memory and parts of 8B-shaped models: bf16 against W4A4, W8A8, W4A16 (the paper's table 4).

Weights and codes are random: speed and memory do not depend on them. A quantized model has what STaR-Quant leaves at
run time when P is shared and folded: gates in the quantizers, TAC in front of the output projection, a Hadamard before
the down-projection.

    python benchmarks/efficiency.py --device cuda --out results/published/efficiency/NAME.json     8B shapes
    python benchmarks/efficiency.py --shape small                                                  a CPU: does it run?
    python -m starquant.tables.efficiency results/published/efficiency                             the table

Nothing but torch, transformers and this package is needed (Triton for the kernels).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from evaluation import VOCABULARY, model_of
from measure import PeakMemory
from torch import nn

from starquant.diffusion import LLaDASampler, MaskPredictor, generate
from starquant.diffusion.samplers import DreamSampler
from starquant.kernels.dispatch import check_device, has_triton
from starquant.models.base import MaskedDiffusionModel
from starquant.models.layers import AttentionCore, InputSite
from starquant.models.roles import Site
from starquant.runtime.description import rebuild, use_integers
from starquant.runtime.packed import PackedLinear
from starquant.runtime.token_state import SiteTransform

PRECISIONS = {"bf16": (16, 16), "w4a4": (4, 4), "w8a8": (8, 8), "w4a16": (4, 16)}
LENGTHS, BATCHES = (64, 128, 256, 512, 1024, 2048), (1, 4, 16)
TAC_BLOCK, GATE = 16, 1 / 32  # g and d_m = d_u of the paper's main setting


def build(family: str, shape: str, precision: str, device: str) -> MaskedDiffusionModel:
    """Return a random model at a precision, its memory that of what is kept."""
    if PRECISIONS[precision][0] == 16:
        return model_of(family, shape, device)
    model = model_of(family, shape, "meta")
    rebuild(model, described(model, *PRECISIONS[precision]))
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dtype == torch.uint8:
                tensor.random_(0, 256 if PRECISIONS[precision][0] > 4 else 255, generator=generator)
            elif name.endswith("scale"):
                tensor.fill_(1e-3)
            else:
                tensor.normal_(std=0.02, generator=generator)
    use_integers(model)
    return model.eval()


def described(model: MaskedDiffusionModel, weights: int, inputs: int) -> dict[str, Any]:
    """Return quantization_config.modules of a model that is quantized throughout."""
    found: dict[str, Any] = {}
    grid = {"bits": inputs, "symmetric": True, "clip_ratio": 1.0}
    for info in model.linears().values():
        packed = {"kind": "packed_linear", "bits": weights, "symmetric": True, "group_size": None}
        found[info.name] = packed | {"bias": info.module.bias is not None}
        width, transform = info.module.in_features, dict.fromkeys(("exact", "correction", "gate"))
        if inputs < 16:
            cut = round(GATE * width)
            transform["gate"] = {"kind": "state_gate", "width": width, "masked": cut, "unmasked": cut}
            if info.role.site is Site.OUT:
                transform["correction"] = {"kind": "block_affine", "shape": [1, width // TAC_BLOCK, TAC_BLOCK]}
            if info.role.site is Site.DOWN:
                transform["exact"] = {"kind": "hadamard", "width": width}
        site = {"kind": "site", "grid": grid if inputs < 16 else None, "state_clip": False}
        found[info.site] = site | {"transform": {"kind": "site_transform", **transform} if inputs < 16 else None}
    return found


def clock(work: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median milliseconds of a call, after warm-up; device events on a GPU."""
    for _ in range(3 if device != "cpu" else 1):
        work()
    times = []
    for _ in range(repeats):
        if device == "cpu":
            began = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - began))
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def parts(model: MaskedDiffusionModel, forward: Callable[[], object], device: str) -> dict[str, float]:
    """Return milliseconds by part of one forward, measured around modules (which adds a little to each)."""
    found: dict[str, float] = {}
    sites = {m for m in model.modules() if isinstance(m, InputSite)}
    inner = {m.transform for m in sites if m.transform is not None and not isinstance(m.transform, SiteTransform)}
    inner |= {part for m in model.modules() if isinstance(m, SiteTransform) for part in (m.correction, m.exact)} - {
        None
    }
    kinds: list[tuple[str, Callable[[nn.Module], bool]]] = [
        ("head", lambda m: m is model.trunk().head),
        ("gemm", lambda m: isinstance(m, PackedLinear | nn.Linear)),
        ("transform", lambda m: m in inner),
        ("quantization", lambda m: m in sites),
        ("attention", lambda m: isinstance(m, AttentionCore)),
    ]
    handles, stack = [], list[float]()

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    for module in model.modules():
        kind = next((name for name, belongs in kinds if belongs(module)), None)
        if kind is None:
            continue

        def before(*_: object) -> None:
            stack.append(now())

        def after(*_: object, kind: str = kind) -> None:
            took = now() - stack.pop()
            found[kind] = found.get(kind, 0.0) + took
            if kind == "transform":  # it runs inside its site
                found["quantization"] = found.get("quantization", 0.0) - took

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    forward()
    found.clear()
    forward()
    for handle in handles:
        handle.remove()
    return {name: round(value, 4) for name, value in found.items()}


def ceilings(device: str) -> dict[str, float]:
    """Measure what the device can do: bf16 and int8 products (operations/s) and a copy (bytes/s)."""
    n = 8192 if device != "cpu" else 512
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    found = {"bf16": 2e3 * n**3 / clock(lambda: a @ a, device, 5)}
    if device != "cpu":
        i = torch.randint(-8, 8, (n, n), device=device, dtype=torch.int8)
        found["int8"] = 2e3 * n**3 / clock(lambda: torch._int_mm(i, i.T), device, 5)
    found["bytes"] = 2e3 * a.nbytes / clock(lambda: a.clone(), device, 5)
    return found


def counted(model: MaskedDiffusionModel, rows: int, length: int, positions: int) -> dict[str, float]:
    """Return operations of the block linears, attention and head, and bytes of the weights that a forward reads."""
    config, tokens = model.config, rows * length
    linears = [m for m in model.modules() if isinstance(m, PackedLinear | nn.Linear) and m is not model.trunk().head]
    width, vocabulary = config.hidden_size, model.trunk().embedding.num_embeddings
    stored = sum(t.nbytes for m in linears for t in (*m.parameters(), *m.buffers()))
    return {
        "linear_operations": 2.0 * tokens * sum(m.in_features * m.out_features for m in linears),
        "attention_operations": 4.0 * tokens * length * width * config.num_hidden_layers,
        "head_operations": 2.0 * positions * width * vocabulary,
        "weight_bytes": float(stored + 2 * width * vocabulary),
    }


def bound_ms(count: dict[str, float], ceiling: dict[str, float], integer: bool) -> float:
    """Return the roofline: the longer of reading the weights and doing the operations."""
    fast = ceiling.get("int8", ceiling["bf16"]) if integer else ceiling["bf16"]
    rest = count["attention_operations"] + count["head_operations"]
    return 1000 * max(
        count["weight_bytes"] / ceiling["bytes"], count["linear_operations"] / fast + rest / ceiling["bf16"]
    )


@contextmanager
def _no_memory_is_no_row() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()


def measure(
    family: str, precision: str, given: argparse.Namespace, ceiling: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Yield one row a batch and length, and one for generation."""
    model = build(family, given.shape, precision, given.device)
    resident = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    same = {"model": family, "shape": given.shape, "precision": precision, "resident_bytes": resident}
    predict, mask = MaskPredictor(model), int(model.config.mask_token_id)
    for rows, length in itertools.product(given.batches, given.lengths):
        ids = torch.randint(0, VOCABULARY - 10, (rows, length), device=given.device)
        ids[:, -32:] = mask  # a block of 32 is predicted
        forward = functools.partial(predict, ids, (ids == mask).nonzero(as_tuple=True))
        with _no_memory_is_no_row():
            with PeakMemory(given.device) as peak:
                took = clock(forward, given.device, given.repeats)
            count = counted(model, rows, length, 32 * rows)
            bound = bound_ms(count, ceiling, PRECISIONS[precision][1] < 16)
            told = {"kind": "forward", "batch": rows, "tokens": length, "ms": took, "activation_mib": peak.mib}
            told |= {"tokens_per_s": 1000 * rows * length / took, "roofline_ms": bound, "of_roofline": bound / took}
            split = parts(model, forward, given.device) if rows == given.batches[0] else None
            yield same | told | count | {"parts_ms": split}
    sampler: Any = DreamSampler(32, 32) if family == "dream" else LLaDASampler(32, 32, 32)
    prompt = torch.randint(0, VOCABULARY - 10, (1, 64))
    took = clock(lambda: generate(model, prompt, sampler), given.device, 1)
    yield same | {"kind": "generation", "batch": 1, "tokens": 32, "ms": took, "tokens_per_s": 32000 / took}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="8b", choices=["small", "8b"])
    parser.add_argument("--families", nargs="+", default=["llada", "dream"], choices=["llada", "dream"])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    given = parser.parse_args()
    check_device(torch.device(given.device))
    name = torch.cuda.get_device_name(given.device) if given.device != "cpu" else platform.processor() or "cpu"
    ceiling, rows = ceilings(given.device), []
    print(f"{name}, torch {torch.__version__}, triton {'yes' if has_triton() else 'no'}; {ceiling}", flush=True)
    for family, precision in itertools.product(given.families, given.precisions):
        for row in measure(family, precision, given, ceiling):
            rows.append(row)
            told = f"{row['ms']:9.2f} ms {row['tokens_per_s']:10.0f} tokens/s {row['resident_bytes'] / 2**30:6.2f} GiB"
            of = f" {row['of_roofline']:.2f} of the roofline {row['parts_ms'] or ''}" if "of_roofline" in row else ""
            what = f"{family} {precision:6s} {row['kind']:10s} {row['batch']:3d} x {row['tokens']:5d}"
            print(what, told + of, flush=True)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"schema_version": 1, "device": name, "torch": torch.__version__, "ceilings": ceiling, "rows": rows}
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
