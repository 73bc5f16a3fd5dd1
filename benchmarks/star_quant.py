"""STaR-Quant: what it costs to fit and to run.

1. Fake-quant forward with and without gates and TAC, alternating in one process, on the embedded model.
2. Fit of star_quant beside quarot (GPTQ): seconds and peak memory at d = 1024, 4 layers, with dense, Kronecker and
   shared transforms.
3. `--count`: multiply-adds at run time and operations and memory of the fit at the shapes of the 8B models, counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from calibration import BITS, model_of, peak_of, random_states
from measure import alternate, machine

from starquant.config.methods import METHODS
from starquant.config.methods.star_quant import STaRQuantOptions, TransformOptions
from starquant.models import load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.numerics import fermat_sizes, kronecker_sizes
from starquant.testbed.tiny.shipped import weights_folder


@dataclass(frozen=True)
class Shape:
    """Sizes of one published model's blocks."""

    name: str
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    layers: int

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    def sites(self) -> dict[str, tuple[int, int, tuple[int, int]]]:
        """Return input width, outputs of all readers and Kronecker factors of each site."""
        d, kv, f = self.width, self.kv_heads * self.head_width, self.feed_forward
        return {
            "qkv_input": (d, d + 2 * kv, kronecker_sizes(d)),
            "out_input": (d, d, (self.heads, self.head_width)),
            "gate_up_input": (d, 2 * f, kronecker_sizes(d)),
            "down_input": (f, d, kronecker_sizes(f)),
        }


SHAPES = (Shape("LLaDA-8B", 4096, 32, 32, 12288, 32), Shape("Dream-7B", 3584, 28, 4, 18944, 28))


def count(shape: Shape, g: int = 16) -> None:
    """Print operations a token and block at run time, and of the whole fit."""
    options = TransformOptions()
    linears = sum(width * outputs for width, outputs, _ in shape.sites().values())
    dense = sum(width * width for width, _, _ in shape.sites().values())
    kronecker = sum(width * sum(factors) for width, _, factors in shape.sites().values())
    own = sum(shape.sites()[site][0] * sum(shape.sites()[site][2]) for site in ("out_input", "down_input"))
    tac, tac_64 = shape.width * g, shape.width * 64
    flat = sum(width * sum(fermat_sizes(width)) for width in (shape.width, shape.width, shape.feed_forward))
    flat += shape.width * shape.heads  # at the output projection: across heads; within them V's is folded
    print(f"{shape.name}: {linears / 1e6:.1f} M multiply-adds a token and block in the linears")
    for name, value in (
        ("dense P", dense),
        ("Kronecker P", kronecker),
        ("shared P, folded; Kronecker at out, down", own),
        ("FlatQuant", flat),
        ("star_quant_plus: Kronecker P, TAC, g = 64", kronecker + tac_64),
    ):
        print(f"  {name:42s} {value / 1e6:7.2f} M = {100 * value / linears:5.2f} %")
    print(f"  {'TAC, g = 16 (folded: none)':42s} {tac / 1e6:7.2f} M = {100 * tac / linears:5.2f} %")
    rows = 2 * options.batch
    # Forward and backward of x W^T and of both transforms of W and x: three products each.
    step = sum(3 * 2 * (rows * w * o + (rows + o) * w * sum(k)) for w, o, k in shape.sites().values())
    walks = 6 * 2 * linears * 128 * 256  # passes over 128 segments of 256 tokens: rows, both sides of TAC, hand-over
    total = shape.layers * (options.steps * step + walks)
    widest = max(w * o for w, o, _ in shape.sites().values()) * 4 / 2**30
    hidden = 128 * 256 * shape.width * 2 / 2**30
    print(f"  fit: {total / 1e15:.1f} PFLOP, {total / 30e12 / 3600:.2f} h at 30 TFLOP/s; about 8 float32 copies of the")
    print(f"  widest group's weights, {8 * widest:.1f} GiB, one block, {hidden:.1f} GiB of hidden states")


def overhead(repeats: int) -> None:
    """Print fake-quant forward times without gates and TAC, with each, and with both."""
    model_options = {
        "neither": {"sgat": {"enabled": False}, "tac": {"enabled": False}},
        "gates": {"tac": {"enabled": False}},
        "TAC": {"sgat": {"enabled": False}},
        "both": {},
        "both, TAC on values": {"tac": {"placement": "value"}},
    }
    for rows, length in ((1, 32), (32, 32)):
        models = {name: _fitted(options) for name, options in model_options.items()}
        ids = torch.randint(5, 300, (rows, length))
        ids[:, ::2] = models["both"].mask_token_id

        def forward(model: MaskedDiffusionModel, ids: torch.Tensor = ids) -> None:
            with torch.inference_mode():
                model(ids)

        medians = alternate({n: lambda m=m: forward(m) for n, m in models.items()}, repeats, warmup=3)
        cells = [f"{n} {1e3 * s:.2f} ms ({s / medians['neither']:.2f}x)" for n, s in medians.items()]
        print(f"embedded model, {rows} x {length} tokens: " + ", ".join(cells))


def _fitted(options: dict[str, object]) -> MaskedDiffusionModel:
    quick = {"transform": {"steps": 2, "rows": 32}}
    run = METHODS.build(STaRQuantOptions.model_validate_json(json.dumps({"name": "star_quant"} | quick | options)))
    model = load_model(weights_folder(0))
    states = _within_vocabulary(model)
    run.apply(model, run.fit(model, BITS, states), BITS)
    return model


def _within_vocabulary(model: MaskedDiffusionModel) -> object:
    from dataclasses import replace

    states = random_states(300, 32, 32)
    batches = [replace(b, ids_BL=b.ids_BL.masked_fill(b.ids_BL == 1, model.mask_token_id)) for b in states.batches]
    return replace(states, batches=batches, mask_id=model.mask_token_id)


def fits() -> None:
    """Print seconds and peak memory of fits, a process each; those of all steps by extrapolation from 2 and 6."""
    print("fit at d = 1024, F = 3072, 4 layers, 8 x 128 tokens, blocks on disk, W4A4: above the model without blocks")
    steps = TransformOptions().steps
    with tempfile.TemporaryDirectory() as folder:
        model_of(1024, 4, 3072).save_pretrained(folder)
        costs = _in_a_process(folder, {"name": "quarot"})
        print(f"  {'quarot (GPTQ)':28s} {costs['seconds']:7.1f} s, peak {costs['peak']:5.0f} MiB")
        for structure in ("kronecker", "auto", "shared", "dense"):
            few, more = (
                _in_a_process(folder, {"name": "star_quant", "transform": {"structure": structure, "steps": n}})
                for n in (2, 6)
            )
            whole = few["seconds"] + (more["seconds"] - few["seconds"]) / 4 * (steps - 2)
            label = f"star_quant, {structure}"
            print(f"  {label:28s} {whole:7.1f} s ({steps} steps), peak {more['peak']:5.0f} MiB")


def _in_a_process(folder: str, options: dict[str, object]) -> dict[str, float]:
    command = [sys.executable, __file__, "--peak", folder, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for part in Path(folder).glob("fitted/*"):
        part.unlink()
    costs: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return costs


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--count", action="store_true", help="only count operations at the shapes of the 8B models")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        folder, options = arguments.peak[0], json.loads(arguments.peak[1])
        peak_of(folder, METHODS.build(METHODS.options(options["name"]).model_validate_json(arguments.peak[1])))
        return
    for shape in SHAPES:
        count(shape)
    if arguments.count:
        return
    print(machine())
    overhead(arguments.repeats)
    fits()


if __name__ == "__main__":
    main()
