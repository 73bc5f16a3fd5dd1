"""Which launch settings transform rows fastest: what `tiles.py` measures of the passes in front of products."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from efficiency import clock
from torch import Tensor
from tqdm import tqdm

from starquant.kernels import Kronecker, Norm, Prologue, TokenStates, reference
from starquant.kernels.tiles import RowTile, row_key, row_rule, row_tiles
from starquant.models.cuda_graphs import capture

REPEATS = 20  # in one CUDA graph
REGISTERS = 65536  # of a processor


@dataclass(frozen=True)
class Transform:
    """P = A (x) B of rows of a width, behind SwiGLU or a norm, as STaR-Quant has it at 8B."""

    width: int
    a: int
    swiglu: bool

    @property
    def b(self) -> int:
        """Size of B."""
        return self.width // self.a


TRANSFORMS = (Transform(4096, 64, False), Transform(12288, 96, True), Transform(3584, 56, False))
TRANSFORMS += (Transform(18944, 128, True),)


def candidates(transform: Transform) -> Iterator[RowTile]:
    """Yield settings that may be worth it: tiles that pad a row to at most 3 / 2, registers that hold it.

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
class Work:
    """Random rows and what transforms them.

    Attributes:
        x: bfloat16 [rows, width].
        prologue: P, gates and clip ratios of token states.
        front: SwiGLU's gate, or a norm.
    """

    x: Tensor
    prologue: Prologue
    front: Tensor | Norm

    @classmethod
    def of(cls, rows: int, transform: Transform) -> Work:
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

    def by_reference(self) -> tuple[Tensor, ...]:
        """Return the same without kernels."""
        norm = isinstance(self.front, Norm)
        x = self.front.apply(self.x) if norm else torch.nn.functional.silu(self.front) * self.x
        return reference.quantize_rows(x, 4, prologue=self.prologue)


def usual(rows: int, transform: Transform) -> RowTile:
    """Return what the rule would take."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return row_rule(rows, transform.width, transform.a, transform.b, processors)


def compile_row(case: tuple[int, Transform, RowTile]) -> None:
    """Fill Triton's cache; what does not compile is found out when it is measured."""
    rows, transform, settings = case
    with contextlib.suppress(Exception):
        Work.of(rows, transform).run(settings)
        torch.cuda.synchronize()


def microseconds(rows: int, transform: Transform, several: list[RowTile]) -> dict[RowTile, float]:
    """Return the time of a pass by settings; those that do not run, or give other codes, are left out."""
    work, times = Work.of(rows, transform), dict[RowTile, float]()
    expected = work.by_reference()[0].int()
    for settings in several:
        try:
            apart = (work.run(settings)[0].int() - expected).abs()
            if int(apart.max()) > 1 or float((apart > 0).float().mean()) > 0.1:
                raise ValueError(f"{float((apart > 0).float().mean()):.1%} of the codes are others")
            replay = capture(functools.partial(_repeated, work, settings))
            times[settings] = 1000 * clock(replay, "cuda", 0.02) / REPEATS
        except Exception as error:
            tqdm.write(f"  {settings}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:100]}")
    return times


def _repeated(work: Work, settings: RowTile) -> None:
    for _ in range(REPEATS):
        work.run(settings)


def name_of(rows: int, transform: Transform) -> str:
    """Return the key under which settings are kept."""
    return row_key(rows, transform.width, transform.a)
