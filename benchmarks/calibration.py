"""Calibration: seconds and peak memory of every method, and how memory grows with the number of blocks.

First every method on a 4-layer, d = 256 LLaDA and 8 segments of 128 tokens: seconds in one process, peak of anonymous
memory in a process each. Then GPTQ and QuaRot on models of 4, 8 and 16 layers at d = 1024 whose blocks stay on disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import machine

from starquant.calibration.batches import CalibrationStates, StateBatch
from starquant.config.bits import ActivationSpec, BitsSpec, WeightSpec
from starquant.config.methods import METHODS
from starquant.methods.base import Method
from starquant.models.base import MaskedDiffusionModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM

BITS = BitsSpec(name="w4a4", weights=WeightSpec(bits=4), activations=ActivationSpec(bits=4))
MASK = 1


def random_states(vocabulary: int, segments: int, length: int) -> CalibrationStates:
    """Return uniformly drawn tokens at mask ratios spread from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (segments, length), generator=generator)
    ratio = (torch.arange(segments) + 0.5) / segments
    masked = torch.rand(ids.shape, generator=generator) < ratio[:, None]
    rows = ids.masked_fill(masked, MASK).split(4)
    batches = [
        StateBatch(part, torch.ones_like(part, dtype=torch.bool), (part == MASK).double().mean(1)) for part in rows
    ]
    return CalibrationStates(batches, MASK, bins=4)


def model_of(width: int, layers: int, feed_forward: int) -> MaskedDiffusionModel:
    """Return a random LLaDA."""
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=width,
        n_heads=width // 64,
        n_layers=layers,
        mlp_hidden_size=feed_forward,
        vocab_size=2048,
        max_sequence_length=512,
        mask_token_id=MASK,
        eos_token_id=0,
    )
    return LLaDAModelLM(config).eval()


def anonymous_mib() -> float:
    """Return the process's anonymous resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def time_methods() -> None:
    """Print seconds of fit and apply for each method."""
    print("4 layers, d = 256, 8 x 128 tokens, W4A4: seconds (median of 3), peak memory of fit")
    states = random_states(2048, 8, 128)
    for name in sorted(set(METHODS) - {"packed"}):  # which takes no full precision
        options = METHODS.options(name)(name=name)
        times = []
        for _ in range(4):
            model = model_of(256, 4, 768)
            began = time.perf_counter()
            method = METHODS.build(options)
            fitted = method.fit(model, BITS, states if options.needs_calibration else None)
            middle = time.perf_counter()
            method.apply(model, fitted, BITS)
            times.append((middle - began, time.perf_counter() - middle))
        fit, apply = (sorted(column)[1] for column in zip(*times[1:], strict=True))
        peak = in_a_process(model_of(256, 4, 768), name)["peak"]
        print(f"  {name:20s} fit {fit:6.3f}   apply {apply:6.3f}   peak {peak:4.0f} MiB")


def peak_of(folder: str, method: Method) -> None:
    """Fit a method on a checkpoint whose blocks stay on disk; print what it cost on top of the rest of the model."""
    import threading

    from starquant.methods.fitted import Fitted
    from starquant.models import load_model

    model = load_model(folder, blocks_on_disk=True)
    states = random_states(2048, 8, 128)
    baseline = peak = anonymous_mib()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_mib())
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    method.fit(model, BITS, states if method.options.needs_calibration else None, into=Fitted(Path(folder) / "fitted"))
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    print(json.dumps({"peak": peak - baseline, "seconds": seconds}))


def in_a_process(model: MaskedDiffusionModel, method_name: str) -> dict[str, float]:
    """Save a model and measure a method on it in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        command = [sys.executable, __file__, "--peak", folder, method_name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        costs: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return costs


def grow(layers: list[int]) -> None:
    """Print peak memory of `fit` by number of layers."""
    print("d = 1024, blocks and fitted parts on disk, 8 x 128 tokens, W4A4: peak anonymous memory of fit")
    for name in ("gptq", "quarot"):
        for count in layers:
            model = model_of(1024, count, 2816)
            block = sum(p.numel() for p in model.trunk().blocks[0].parameters()) * 4 / 2**20
            costs = in_a_process(model, name)
            print(
                f"  {name:8s} {count:3d} layers ({count * block:5.0f} MiB of blocks, {block:.0f} a block): "
                f"{costs['peak']:5.0f} MiB, {costs['seconds']:5.1f} s"
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--peak", nargs=2, metavar=("FOLDER", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        folder, name = arguments.peak
        peak_of(folder, METHODS.build(METHODS.options(name)(name=name)))
        return
    print(machine())
    time_methods()
    grow(arguments.layers)


if __name__ == "__main__":
    main()
