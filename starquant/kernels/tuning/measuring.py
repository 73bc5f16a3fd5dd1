"""How long products and transforms take under candidate settings, on the GPU that is here."""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starquant.errors import DeviceError
from starquant.kernels import Kronecker, Norm, Prologue, TokenStates, reference
from starquant.kernels.tiles import REGISTERS, RowTile, Tile, row_rule, row_tiles, rule
from starquant.kernels.tuning.shapes import Product, Transform

COLD = 200 * 2**20  # bytes of weights in turn: several times what a cache holds
SPACE = 200 * 1024  # bytes of shared memory that stages of a product may take
LAUNCHES = 24  # of what is timed as one, at least
ROUNDS, LAST_ROUNDS = 3, 20  # that a candidate is timed, and that the fastest of them are
LAST = 4  # as many, and the rule's
#: What is said of a candidate that is left out.
Say = Callable[[str], None]


def candidates(rows: int, shape: Product | Transform) -> list[Any]:
    """Return settings that may be worth it, the rule's first, each once."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    if isinstance(shape, Product):
        usual = rule(rows, shape.outputs, shape.columns, shape.integer, processors)
        return list(dict.fromkeys((usual, *product_candidates(rows, shape))))
    first = row_rule(rows, shape.width, shape.a, shape.b, processors)
    return list(dict.fromkeys((first, *row_candidates(shape))))


def product_candidates(rows: int, product: Product) -> Iterator[Tile]:
    """Yield tiles of a product whose stages fit, split among programs where tiles are few."""
    most = 256 if product.integer else 128
    tokens = [m for m in (16, 32, 64, 128, 256) if min(rows, most) // 4 < m <= min(max(16, rows), most)]
    steps = (64, 128, 256) if product.integer and rows <= 32 else (64, 128) if product.integer else (32, 64)
    for m, o, j, stages, split in itertools.product(tokens, (64, 128), steps, (3, 4), (1, 2, 4)):
        bytes_a_step = (1 if product.integer else 2) * m * j * (2 if product.bits <= 4 else 1) + o * j
        programs = -(-rows // m) * -(-product.outputs // o) * split
        if (
            m * o <= 128 * 256
            and bytes_a_step * stages <= SPACE
            and product.columns % (j * split) == 0
            and (split == 1 or (programs <= 600 and product.columns // split >= 4 * j))
        ):
            yield Tile(m, o, j, split, 8 if m * o >= 128 * 128 else 4, stages)


def row_candidates(transform: Transform) -> Iterator[RowTile]:
    """Yield settings of a transform: tiles that pad a row to at most 3 / 2, registers that hold it.

    Not those of 16 warps for wide rows: measuring them ended with an illegal access (H100, Triton 3.6).
    """
    for turned in (False, True) if transform.a != transform.b else (False,):
        a, b = (transform.b, transform.a) if turned else (transform.a, transform.b)
        side, several = row_tiles(a, b)
        cuts = {several, *((size,) * -(-b // size) for size in (64, 128))}
        for columns, warps, registers in itertools.product(sorted(cuts), (4, 8, 16), (96, 128, 168, 248)):
            numbers = side * sum(columns)
            fits = 2 * numbers / (32 * warps) <= registers <= REGISTERS / (32 * warps)  # a row, twice
            idle = (warps == 16 and numbers > 4096) or (registers > 128 and numbers <= 4096)
            if fits and not idle and numbers <= 1.5 * transform.width:
                yield RowTile(turned, columns, warps, registers)


@dataclass(frozen=True)
class ProductWork:
    """Random tokens and copies of a weight, which are multiplied in turn so that none lies in a cache."""

    product: Product
    x: Tensor
    token: Tensor
    weights: list[Tensor]
    channel: Tensor

    @classmethod
    def of(cls, rows: int, product: Product, copies: int | None = None) -> ProductWork:
        """Return work on so many rows."""
        new = functools.partial(torch.randint, device="cuda")
        x = torch.randn(rows, product.width, device="cuda", dtype=torch.bfloat16)
        if product.integer:
            x = new(-8, 8, x.shape, dtype=torch.int8)
        size = product.outputs * product.columns
        copies = max(4, min(256, COLD // size)) if copies is None else copies
        weights = [new(0, 255, (product.outputs, product.columns), dtype=torch.uint8) for _ in range(copies)]
        return cls(product, x, torch.rand(rows, 1, device="cuda"), weights, torch.rand(product.outputs, device="cuda"))

    @property
    def copies(self) -> int:
        """Products of one `run`."""
        return len(self.weights)

    def once(self, weight: Tensor, tile: Tile) -> Tensor:
        """Return one product."""
        from starquant.kernels.triton.linear import linear, linear_16

        if self.product.integer:
            more = self.product.bits, None, torch.bfloat16, tile
            return linear(self.x, self.token, weight, self.channel, *more)
        return linear_16(self.x, weight, self.channel, self.product.bits, None, tile)

    def run(self, tile: Tile) -> None:
        """Multiply with every copy."""
        for weight in self.weights:
            self.once(weight, tile)

    def judge(self, tile: Tile) -> None:
        """Raise ValueError where the numbers are not those of PyTorch's own product."""
        result = self.once(self.weights[0], tile).double()
        codes = reference.weight_codes(self.weights[0], self.product.bits)
        if self.product.integer:
            sums = reference.accumulate(self.x, codes)
            expected = reference.scaled(sums, self.token, self.channel, None, torch.bfloat16).double()
        else:
            expected = (self.x.float() @ (codes.float() * self.channel[:, None]).T).double()
        apart = float((result - expected).norm() / expected.norm())
        if not apart < 3e-3:  # rounding the result to bfloat16 makes .17 %
            raise ValueError(f"{apart:.1e} from what it should be")


@dataclass(frozen=True)
class RowWork:
    """Random rows and what transforms them.

    Attributes:
        x: bfloat16 [rows, width].
        prologue: P, gates and clip ratios of token states.
        front: SwiGLU's gate, or a norm.
    """

    x: Tensor
    prologue: Prologue
    front: Tensor | Norm
    copies: int = 1

    @classmethod
    def of(cls, rows: int, transform: Transform) -> RowWork:
        """Return work on so many rows."""
        generator = torch.Generator("cuda").manual_seed(0)
        new = functools.partial(torch.randn, device="cuda", generator=generator)
        x, gate = (new(rows, transform.width, dtype=torch.bfloat16) for _ in range(2))
        factors = (torch.linalg.qr(new(n, n))[0].contiguous() for n in (transform.a, transform.b))
        closed, clip = round(transform.width / 32), torch.tensor([0.9, 0.8], device="cuda")
        states = TokenStates(torch.arange(rows, device="cuda") % 2, closed, closed, clip)
        front = gate if transform.swiglu else Norm(torch.ones_like(x[0]), 1e-5)
        return cls(x, Prologue(None, Kronecker(*factors), states), front)

    def run(self, settings: RowTile) -> tuple[Tensor, ...]:
        """Transform and quantize."""
        from starquant.kernels.triton.transform import transform_rows

        assert self.prologue.kronecker is not None
        more = self.prologue.kronecker, self.prologue.states
        return transform_rows(self.x, 4, 1.0, *more, front=self.front, settings=settings)

    def judge(self, settings: RowTile) -> None:
        """Raise ValueError where too many codes are not those of PyTorch; sums are taken in another order."""
        front, x = self.front, self.x
        x = front.apply(x) if isinstance(front, Norm) else torch.nn.functional.silu(front) * x
        apart = (self.run(settings)[0].int() - reference.quantize_rows(x, 4, prologue=self.prologue)[0].int()).abs()
        if int(apart.max()) > 1 or float((apart > 0).float().mean()) > 0.1:
            raise ValueError(f"{float((apart > 0).float().mean()):.1%} of the codes are others")


def work_of(rows: int, shape: Product | Transform, few: bool = False) -> ProductWork | RowWork:
    """Return what is run to measure a shape; `few` where it is only compiled."""
    if isinstance(shape, Transform):
        return RowWork.of(rows, shape)
    return ProductWork.of(rows, shape, 1 if few else None)


def compile_one(case: tuple[int, Product | Transform, Any]) -> None:
    """Fill Triton's cache; what does not compile is left out when it is measured."""
    rows, shape, settings = case
    with contextlib.suppress(Exception):
        work_of(rows, shape, few=True).run(settings)
        torch.cuda.synchronize()


class GaveUpError(DeviceError):
    """This process cannot use the GPU any more.

    Attributes:
        settings: under which it gave up.
    """

    def __init__(self, settings: Any, reason: str) -> None:
        super().__init__(
            f"the GPU gave up under {settings} ({reason}); what was measured before is kept, the same command goes on "
            "without these settings"
        )
        self.settings = settings


def microseconds(work: ProductWork | RowWork, several: list[Any], say: Say) -> dict[Any, float]:
    """Return the time by settings; those that do not run, or give other numbers, are said and left out.

    All are timed in a few rounds, the fastest and the first of them in more: those times are comparable, others are
    larger.

    Raises:
        GaveUpError: settings after which this process cannot use the GPU any more.
    """
    times = dict[Any, float]()
    for settings in several:
        try:
            work.judge(settings)
            times[settings] = _timed(work, settings, ROUNDS)
        except Exception as error:
            _validate_alive(settings)
            say(f"{settings}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:100]}")
    fastest = sorted(times, key=lambda settings: times[settings])[:LAST]
    last = {settings: _timed(work, settings, LAST_ROUNDS) for settings in {*fastest, *several[:1]} & {*times}}
    return {settings: max(took, max(last.values())) for settings, took in times.items()} | last


def _timed(work: ProductWork | RowWork, settings: Any, rounds: int) -> float:
    """Return the microseconds of one launch among many in a CUDA graph, the median of some rounds."""
    repeats = -(-LAUNCHES // work.copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work.run(settings)
    graph.replay()
    return 1000 * statistics.median(gpu_milliseconds(graph.replay, rounds)) / repeats / work.copies


def gpu_milliseconds(work: Callable[[], object], rounds: int) -> list[float]:
    """Return the time of each round; all are queued before any is waited for, else the GPU waits for each launch."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in pairs:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) for start, end in pairs]


def _validate_alive(settings: Any) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise GaveUpError(settings, reason) from error
