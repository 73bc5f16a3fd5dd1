"""Which tiles are fastest on this GPU: measures candidates on the products and transforms of LLaDA-8B and Dream-7B.

    python benchmarks/tiles.py                                         all of them; stop it whenever you like
    python benchmarks/tiles.py --bits 4 --rows 16 128 1024             the W4A4 model's, for three lengths

Every candidate multiplies weights that lie in no cache (copies in turn, in one CUDA graph); the fastest of a product is
kept, beside what the rule would have taken; likewise of a transform (`row_tiles.py`). What the file holds for this GPU
is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import row_tiles
import torch
from efficiency import clock
from torch import Tensor
from tqdm import tqdm

from starquant.kernels.tiles import Tile, key, rule
from starquant.models.cuda_graphs import capture

ROWS = (16, 32, 64, 128, 256, 512, 1024, 2048)
COLD = 200 * 2**20  # bytes of weights in turn: several times what a cache holds


@dataclass(frozen=True)
class Product:
    """rows x K times K x outputs; bits of the weight, activations as integers or as they are."""

    outputs: int
    width: int
    bits: int
    integer: bool

    @property
    def columns(self) -> int:
        """Bytes of a row of the weight."""
        return self.width // 2 if self.bits <= 4 else self.width


def products() -> list[Product]:
    """Return the products of both published shapes, and the heads (8 bits, 16-bit activations)."""
    joined = [(12288, 4096), (24576, 4096), (4608, 3584), (37888, 3584)]  # q, k, v; gate, up: one product each
    alone = [(4096, 4096), (4096, 12288), (3584, 3584), (3584, 18944)]
    integers = [Product(o, k, bits, True) for bits in (4, 8) for o, k in (*alone, *joined)]
    apart = [(12288, 4096), (512, 3584), (18944, 3584)]
    mixed = [Product(o, k, 4, False) for o, k in (*alone, *apart)]
    return [*integers, *mixed, Product(126464, 4096, 8, False), Product(152064, 3584, 8, False)]


def candidates(rows: int, product: Product) -> Iterator[Tile]:
    """Yield settings that may be worth it."""
    most = 256 if product.integer else 128
    tokens = [m for m in (16, 32, 64, 128, 256) if min(rows, most) // 4 < m <= min(max(16, rows), most)]
    steps = (64, 128, 256) if product.integer and rows <= 32 else (64, 128) if product.integer else (32, 64)
    for m, o, j, stages, split in itertools.product(tokens, (64, 128), steps, (3, 4), (1, 2, 4)):
        bytes_a_step = (1 if product.integer else 2) * m * j * (2 if product.bits <= 4 else 1) + o * j
        programs = -(-rows // m) * -(-product.outputs // o) * split
        if (
            m * o <= 128 * 256
            and bytes_a_step * stages <= 200 * 1024
            and (split == 1 or (programs <= 600 and product.columns // split >= 4 * j))
        ):
            yield Tile(m, o, j, split, 8 if m * o >= 128 * 128 else 4, stages)


def operands(rows: int, product: Product, copies: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Return activations, their scales, weights in turn, and channel scales."""
    x = torch.randn(rows, product.width, device="cuda", dtype=torch.bfloat16)
    if product.integer:
        x = torch.randint(-8, 8, x.shape, device="cuda", dtype=torch.int8)
    shape = product.outputs, product.columns
    weights = [torch.randint(0, 255, shape, device="cuda", dtype=torch.uint8) for _ in range(copies)]
    return x, torch.rand(rows, 1, device="cuda"), weights, torch.rand(product.outputs, device="cuda")


def multiply(product: Product, x: Tensor, token: Tensor, weight: Tensor, channel: Tensor, tile: Tile | None) -> Tensor:
    """Return one product."""
    from starquant.kernels.triton.linear import linear, linear_16

    if product.integer:
        return linear(x, token, weight, channel, product.bits, None, torch.bfloat16, tile)
    return linear_16(x, weight, channel, product.bits, None, tile)


def compile_one(case: tuple[int, Product, Tile]) -> None:
    """Fill Triton's cache; what does not compile is found out when it is measured."""
    rows, product, tile = case
    with contextlib.suppress(Exception):
        x, token, weights, channel = operands(rows, product, 1)
        multiply(product, x, token, weights[0], channel, tile)
        torch.cuda.synchronize()


def kinds_of(cases: list[tuple[int, Product, Tile]]) -> list[tuple[int, Product, Tile]]:
    """Return one case of every kernel that will be measured: of each kind of product and tile."""
    kinds: dict[tuple[object, ...], tuple[int, Product, Tile]] = {}
    for rows, product, tile in cases:
        even = product.columns % (tile.j * tile.split) == 0
        shape = tile.m, tile.o, tile.j, tile.split > 1, tile.warps, tile.stages
        kinds[(product.bits, product.integer, even, *shape)] = rows, product, tile
    return list(kinds.values())


def compile_all(work: Callable[[Any], None], cases: list[Any], processes: int) -> None:
    """Compile kernels in several processes."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(tqdm(pool.map(work, cases), "compile", total=len(cases), unit="kernel"))


def microseconds(rows: int, product: Product, tiles: list[Tile]) -> dict[Tile, float]:
    """Return the time of one product by tile, on weights that lie in no cache.

    Tiles that do not run, or give other numbers than the first, are left out.
    """
    copies = max(4, min(256, COLD // (product.outputs * product.columns)))
    x, token, weights, channel = operands(rows, product, copies)
    expected, times = multiply(product, x, token, weights[0], channel, tiles[0]).float(), dict[Tile, float]()

    def work(tile: Tile) -> None:
        for weight in weights:
            multiply(product, x, token, weight, channel, tile)

    for tile in tiles:
        try:
            apart = (multiply(product, x, token, weights[0], channel, tile).float() - expected).norm() / expected.norm()
            if float(apart) > (0.0 if product.integer else 1e-2):
                raise ValueError(f"{float(apart):.1e} from {tiles[0]}")
            times[tile] = 1000 * clock(capture(functools.partial(work, tile)), "cuda", 0.02) / copies
        except Exception as error:
            tqdm.write(f"  {tile}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:100]}")
    return times


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("starquant/kernels/tiles.json"))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8], help="of weights")
    parser.add_argument("--widths", nargs="+", type=int, default=[3584, 4096, 12288, 18944], help="inputs of products")
    parser.add_argument("--integers", action="store_true", help="products of integer tokens alone, no W4A16")
    parser.add_argument("--parts", nargs="+", choices=["products", "rows"], default=["products", "rows"])
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: no GPU here; tiles are measured on one")
    file = Kept(arguments.out)
    if "products" in arguments.parts:
        measure_products(file, arguments)
    if "rows" in arguments.parts:
        measure_rows(file, arguments)


class Kept:
    """The file of settings, by GPU; written whole after each.

    Args:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        of_gpu = self.stored.setdefault(torch.cuda.get_device_name(0), {})
        self.products, self.rows = (of_gpu.setdefault(kind, {}) for kind in ("products", "rows"))

    def take(self, kind: dict[str, Any], name: str, times: dict[Any, float], usual: Any) -> None:
        """Keep the fastest settings."""
        if not times:
            return
        best = min(times, key=lambda settings: times[settings])
        rule_us = times.get(usual, float("nan"))
        tqdm.write(f"{name}: {times[best]:.1f} us, rule {rule_us:.1f} us; {best}")
        kind[name] = asdict(best)
        work = self.path.with_name(self.path.name + ".part")
        work.write_text(json.dumps(self.stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(work, self.path)


def measure_products(file: Kept, arguments: argparse.Namespace) -> None:
    """Measure products that the file does not hold."""
    wanted = [p for p in products() if p.bits in arguments.bits and p.width in arguments.widths]
    wanted = [p for p in wanted if p.integer or not arguments.integers]
    todo = [(rows, p) for rows, p in itertools.product(arguments.rows, wanted) if _name(rows, p) not in file.products]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    tiles = {
        (rows, p): [rule(rows, p.outputs, p.columns, p.integer, processors), *candidates(rows, p)] for rows, p in todo
    }
    cases = [(*case, tile) for case, several in tiles.items() for tile in several]
    compile_all(compile_one, kinds_of(cases), arguments.processes)
    for rows, product in tqdm(todo, unit="product"):
        several = tiles[rows, product]
        file.take(file.products, _name(rows, product), microseconds(rows, product, several), several[0])


def measure_rows(file: Kept, arguments: argparse.Namespace) -> None:
    """Measure transforms that the file does not hold."""
    wanted = [t for t in row_tiles.TRANSFORMS if t.width in arguments.widths]
    todo = [(n, t) for n, t in itertools.product(arguments.rows, wanted) if row_tiles.name_of(n, t) not in file.rows]
    several = {t: list(dict.fromkeys((row_tiles.usual(n, t), *row_tiles.candidates(t)))) for n, t in todo}
    cases = [(64, t, settings) for t, settings_of in several.items() for settings in settings_of]
    compile_all(row_tiles.compile_row, cases, arguments.processes)
    for rows, transform in tqdm(todo, unit="transform"):
        usual = row_tiles.usual(rows, transform)
        times = row_tiles.microseconds(rows, transform, list(dict.fromkeys((usual, *several[transform]))))
        file.take(file.rows, row_tiles.name_of(rows, transform), times, usual)


def _name(rows: int, product: Product) -> str:
    return key(rows, product.outputs, product.columns, product.integer)


if __name__ == "__main__":
    main()
