"""Measure which launch settings of the integer kernels are fastest on the GPU that is here, and keep them.

    starquant tune              LLaDA-8B's and Dream-7B's W4A4
    starquant tune DIR          what the packed checkpoint DIR multiplies

They go into CACHE/tiles.json (`starquant/store/cache.py`), which is read beside the settings that are shipped. What it
holds for this GPU is not measured again; stop it whenever you like. Settings under which a GPU gave up are written down
beside it (tiles.failed.json), and left out from then on.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from starquant.errors import CommandParser, ConfigError, DeviceError, one_line_errors, user_path
from starquant.kernels.tiles import Measured, read_tiles
from starquant.kernels.tuning.shapes import PUBLISHED, PUBLISHED_HEADS, Product, Transform
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Site
from starquant.packed.tuned import tuned_file
from starquant.quantized.activation_quantizer import ActivationQuantizer
from starquant.quantized.packed_linear import PackedLinear
from starquant.session.progress import for_terminal
from starquant.store.files import write_atomically

ROWS = (16, 128, 256, 1024)
A_WORKER = 8  # kernels that it compiles


class Kept:
    """The file of settings, by GPU, and that of those that failed; each written whole.

    Args:
        path: of the file.
        gpu: name of the one that is here.

    Raises:
        ConfigError: a file that is none of settings.
    """

    def __init__(self, path: Path, gpu: str) -> None:
        self.path, self.gpu, self.by_gpu = path, gpu, read_tiles(path)
        self.of_gpu = self.by_gpu.setdefault(gpu, Measured({}, {}))
        self.failed_path = path.with_name(f"{path.stem}.failed.json")
        self.failed: list[str] = _listed(self.failed_path)

    def holds(self, rows: int, shape: Product | Transform) -> bool:
        """Whether settings are there."""
        return shape.key(rows) in getattr(self.of_gpu, shape.kind)

    def may_try(self, rows: int, shape: Product | Transform, settings: Any) -> bool:
        """Whether the GPU has not given up under settings of a shape."""
        return self._line(rows, shape, settings) not in self.failed

    def _line(self, rows: int, shape: Product | Transform, settings: Any) -> str:
        return f"{self.gpu}: {shape.key(rows)}: {settings}"

    def gave_up(self, rows: int, shape: Product | Transform, settings: Any) -> None:
        """Put down settings of a shape under which the GPU gave up."""
        self.failed.append(self._line(rows, shape, settings))
        write_atomically(self.failed_path, json.dumps(self.failed, indent=1) + "\n")

    def take(self, rows: int, shape: Product | Transform, settings: Any) -> None:
        """Keep settings."""
        getattr(self.of_gpu, shape.kind)[shape.key(rows)] = settings
        stored = {gpu: asdict(measured) for gpu, measured in self.by_gpu.items()}
        write_atomically(self.path, json.dumps(stored, indent=1, sort_keys=True) + "\n")


def _listed(path: Path) -> list[str]:
    """Return the settings that a file lists; raises ConfigError where it holds something else."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, list) or not all(isinstance(one, str) for one in content):
        raise ConfigError(f"{path}: holds no list of launch settings; remove it")
    return content


def cases_of(
    shapes: Sequence[Product | Transform], heads: Sequence[Product], rows: Sequence[int]
) -> list[tuple[int, Product | Transform]]:
    """Return what is measured: blocks' shapes at all numbers of rows, heads at the fewest."""
    return [*itertools.product(rows, shapes), *((min(rows), head) for head in heads)]


def tune(file: Path, wanted: Sequence[tuple[int, Product | Transform]], processes: int) -> None:
    """Measure shapes at numbers of rows that the file does not hold; prints a line each."""
    from starquant.kernels.tuning.measuring import GaveUpError, candidates, compile_one, microseconds, work_of

    kept, progress = Kept(file, torch.cuda.get_device_name(0)), for_terminal()
    todo = [(n, shape) for n, shape in wanted if not kept.holds(n, shape)]
    several = {case: [one for one in candidates(*case) if kept.may_try(*case, one)] for case in todo}
    cases = [(n, shape, settings) for (n, shape), those in several.items() for settings in those]
    kernels = list({shape.kernel(settings): (n, shape, settings) for n, shape, settings in cases}.values())
    workers = min(processes, len(kernels) or 1)
    spawned = get_context("spawn")
    # A GPU that gave up in a worker fails all that comes after it there: no worker lives long.
    with ProcessPoolExecutor(workers, mp_context=spawned, max_tasks_per_child=A_WORKER) as pool:
        compiling = [pool.submit(compile_one, case) for case in kernels]
        for done in progress.bar(as_completed(compiling), "compile", "kernel", total=len(kernels)):
            done.result()
    for n, shape in progress.bar(todo, "measure", "shape"):
        usual, work = next(iter(several[n, shape]), None), work_of(n, shape)
        try:
            times = microseconds(work, several[n, shape], lambda said: print(f"  left out: {said}", file=sys.stderr))
        except GaveUpError as error:
            kept.gave_up(n, shape, error.settings)
            raise
        if times:
            best = min(times, key=lambda settings: times[settings])
            print(f"{shape.key(n)}: {times[best]:.1f} us, by rule {times.get(usual, float('nan')):.1f} us; {best}")
            kept.take(n, shape, best)


def shapes_of(model: MaskedDiffusionModel) -> tuple[Product | Transform, ...]:
    """Return the shapes of a packed model that is loaded on a GPU, each once, in the order of a forward pass."""
    shapes: dict[Product | Transform, None] = {}
    for block in model.trunk().blocks:
        sites = model.block_sites(block)
        for site, module in sites.inputs.items():
            kind = site if isinstance(site, Site) else site.kind
            shapes |= dict.fromkeys(_at(kind, module, [*sites.readers(site).values()]))
    return tuple(shapes)


def heads_of(model: MaskedDiffusionModel) -> tuple[Product, ...]:
    """Return the product of a packed model's head; none where it is not packed."""
    head = model.trunk().head
    if not isinstance(head, PackedLinear):
        return ()
    return (Product(head.out_features, head.in_features, head.weight_format.bits, False),)


def _at(site: Site, module: nn.Module, readers: Sequence[nn.Module]) -> Iterator[Product | Transform]:
    packed = [linear for linear in readers if isinstance(linear, PackedLinear)]
    if not isinstance(module, ActivationQuantizer):
        for linear in packed:
            yield Product(linear.out_features, linear.in_features, linear.weight_format.bits, False)
        return
    kronecker = None if module.prologue is None else module.prologue.kronecker
    if kronecker is not None and kronecker.b_NN is not None:
        yield Transform(packed[0].in_features, len(kronecker.a_MM), site is Site.DOWN)
    if module.joined is not None:
        yield Product(sum(module.joined.sizes), packed[0].in_features, module.joined.bits)
        return
    for linear in packed:
        yield Product(linear.out_features, linear.in_features, linear.weight_format.bits)


def validate_gpu() -> None:
    """Raise DeviceError where there is no GPU, or no Triton."""
    from starquant.kernels.dispatch import HAS_TRITON, validate_tensor_cores

    if not torch.cuda.is_available():
        raise DeviceError("starquant tune: there is no GPU here; settings are measured on one")
    if not HAS_TRITON:
        raise DeviceError("starquant tune: Triton is not installed: pip install 'starquant[triton]'")
    validate_tensor_cores(torch.device("cuda"))


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and keep settings; returns 2 after bad input."""
    parser = CommandParser(prog="starquant tune", description=__doc__)
    parser.add_argument("checkpoint", nargs="?", metavar="DIR", help="a packed checkpoint (default: 8B shapes)")
    parser.add_argument(
        "--rows", nargs="+", type=int, default=list(ROWS), help="tokens of a pass (default %(default)s)"
    )
    parser.add_argument("--out", type=user_path, help="file of the settings (default: in the user's cache)")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    words = parser.parse_args(arguments)
    for name, values in (("rows", words.rows), ("processes", [words.processes])):
        if min(values) < 1:
            raise ConfigError(f"--{name}: got {min(values)}, allowed: 1 or more")
    validate_gpu()
    shapes, heads = PUBLISHED, PUBLISHED_HEADS
    if words.checkpoint is not None:
        from starquant.models import load_model

        model = load_model(words.checkpoint, device="cuda")
        shapes, heads = shapes_of(model), heads_of(model)
        if not shapes:
            raise ConfigError(f"{words.checkpoint}: is not packed; allowed: what export.dir wrote")
    tune(words.out or tuned_file(), cases_of(shapes, heads, words.rows), words.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
