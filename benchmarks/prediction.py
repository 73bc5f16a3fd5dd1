"""What a forward of an 8B shape should take on a card: counted bytes and operations, over measured rates.

    python benchmarks/efficiency.py --predict H100

A forward is a list of passes; a pass takes the longest of its bytes at the rate of a copy, its operations at the rate
of a product, and what a launch takes that does next to nothing. Rates are three ceilings of the card and the share of
them that each kind of pass reached where it was measured: products by the number of tokens, everything else about half
of a copy. The kernels of commit afb57db were measured by themselves (`OLD`); from those figures the forwards that were
measured beside them are predicted, which judges the arithmetic (`error` in what is printed). Today's kernels are
predicted from what was assumed of them before any ran; forwards of theirs were measured once (commit ff3536c).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from starquant.kernels.tiles import is_turned, row_tiles, rule
from starquant.numerics import kronecker_sizes

FOLDER = Path(__file__).parents[1] / "results/published/efficiency"
#: Kernels, and the file of forwards that were measured with them.
MEASURED = {"old": FOLDER / "h100_afb57db.json", "new": FOLDER / "h100_ff3536c.json"}
#: 256: an answer of 128 tokens behind a prompt of 128 is so many forwards of that length.
TOKENS = (16, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Shape:
    """Widths of a model."""

    layers: int
    hidden: int
    keys: int
    inner: int
    words: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of a block's products; q, k, v are one, gate and up are one."""
        joined = (self.hidden + 2 * self.keys, self.hidden), (self.hidden, self.hidden), (2 * self.inner, self.hidden)
        return *joined, (self.hidden, self.inner)


SHAPES = {"llada": Shape(32, 4096, 4096, 12288, 126464), "dream": Shape(28, 3584, 512, 18944, 152064)}
#: Where another shape was measured: Dream's configuration with as many key-value heads as heads, 28 in place of 4.
MEASURED_SHAPES = SHAPES | {"dream": Shape(28, 3584, 3584, 18944, 152064)}


@dataclass(frozen=True)
class Card:
    """Measured rates of a card.

    Attributes:
        bf16: operations a second of a large product.
        int8: the same of this project's W4A4 product at 1,024 tokens, which is faster than the library's int8 one.
        copy: bytes a second, read and written.
        full: share of these rates that a W4A4 product reaches, by tokens up to which it holds; with tiles by the rule
            of afb57db, and with the tiles of `kernels/tiles.json`, which holds those of 128 tokens.
        launch: seconds of a pass in a graph that does next to nothing (assumed; 1.3e-6 was measured).
        processors: among which tiles are spread.
    """

    bf16: float
    int8: float
    copy: float
    full: dict[str, tuple[tuple[int, float], ...]]
    launch: float = 2e-6
    processors: int = 132


#: 16 tokens: 14.1 us for 25 MB of codes. 128: 26 and 18.6 us. From 1,024 on 84 us for 103 G operations.
CARDS = {
    "H100": Card(
        bf16=795e12,
        int8=1221e12,
        copy=2.59e12,
        full={
            "old": ((16, 0.69), (128, 0.37), (512, 0.7), (1 << 30, 1.0)),
            "new": ((16, 0.69), (128, 0.52), (512, 0.7), (1 << 30, 1.0)),
        },
    )
}
Line = dict[str, object]
#: Share of a copy that passes reach which only read and write: plain quantization .5 to .7, measured.
PASS = 0.5
#: As measured at 1,024 tokens: operations a second of P in rows of up to 4,096 and beyond, bytes a second of TAC; and
#: the least that either takes, a wave of programs.
OLD = {"small": 22e12, "large": 38e12, "tac": 0.15e12, "wave": 14e-6}
#: Of the ceiling of 16-bit products, for products that stand between a load and a reduction (assumed).
NEW_PRODUCTS, NEW_WAVE = 0.5, 5e-6


def forward(family: str, precision: str, tokens: int, card: Card, code: str) -> float:
    """Return predicted milliseconds of a compiled forward of one sequence.

    Args:
        family: of `SHAPES`.
        precision: bf16, w4a4-plain or w4a4 (P at every site, gates, TAC).
        tokens: of the sequence.
        card: rates.
        code: "old" for the kernels of afb57db, "new" for this code's.
    """
    return sum(by_part(family, precision, tokens, card, code).values())


def by_part(family: str, precision: str, tokens: int, card: Card, code: str) -> dict[str, float]:
    """Return the milliseconds of each part of `forward`; arguments as there."""
    shape = (MEASURED_SHAPES if code == "old" else SHAPES)[family]
    of_block = {name: sum(passes) for name, passes in _passes(shape, precision, tokens, card, code).items()}
    head = shape.words * shape.hidden * (2 if precision == "bf16" else 1) / card.copy
    return {name: 1000 * shape.layers * seconds for name, seconds in of_block.items()} | {"head": 1000 * head}


def _passes(shape: Shape, precision: str, tokens: int, card: Card, code: str) -> dict[str, list[float]]:
    """Return the seconds of each pass of a block, by part."""
    fused = precision != "bf16" and code == "new"
    return {
        "products": list(_linears(shape, precision, tokens, card, code)),
        "in front": list(_in_front(shape, precision, tokens, card, code)) if precision != "bf16" else [],
        "between": list(_between(shape, tokens, card, fused, swiglu=precision == "bf16" or code == "old")),
        "attention": [4.0 * tokens * tokens * shape.hidden / card.bf16],
    }


def _linears(shape: Shape, precision: str, tokens: int, card: Card, code: str) -> Iterator[float]:
    for place, (outputs, inputs) in enumerate(shape.linears):
        operations, weights = 2.0 * tokens * outputs * inputs, float(outputs * inputs)
        if precision == "bf16":
            yield max(operations / card.bf16, 2 * weights / card.copy, card.launch)
        else:
            share = next(share for most, share in card.full[code] if tokens <= most)
            product = max(max(operations / card.int8, weights / 2 / card.copy) / share, card.launch)
            stream = 2.0 * tokens * outputs / (card.copy * PASS)  # which the second and the fourth are added to
            yield product + (stream if code == "new" and place % 2 else 0.0)


def launches(family: str, precision: str, tokens: int, card: Card) -> int:
    """Return how many kernels of this code a block launches; inputs split among programs need a second one."""
    shape = SHAPES[family]
    passes = sum(len(part) for part in _passes(shape, precision, tokens, card, "new").values())
    splits = (rule(tokens, outputs, inputs // 2, True, card.processors).split > 1 for outputs, inputs in shape.linears)
    return passes - 1 + (0 if precision == "bf16" else sum(splits))  # attention is counted twice: bytes, operations


def _moved(tokens: int, card: Card, numbers: float, codes: float = 0.0) -> float:
    """Return the seconds of a pass that reads and writes so many numbers of 16 bits and codes a token."""
    return max(tokens * (2 * numbers + codes) / (card.copy * PASS), card.launch)


def _between(shape: Shape, tokens: int, card: Card, fused: bool, swiglu: bool) -> Iterator[float]:
    """Yield the seconds of the passes of a block that bf16 has as well; SwiGLU's where it is one.

    Residual and norm are passes of their own unless they are fused, with the products and with what quantizes.
    """
    numbers = () if fused else (4 * shape.hidden,) * 2
    numbers += (2 * (shape.hidden + shape.keys), 2 * (shape.hidden + shape.keys))  # rotary, attention's own traffic
    numbers += (3 * shape.inner,) if swiglu else ()
    yield from (_moved(tokens, card, each) for each in numbers)


def _in_front(shape: Shape, precision: str, tokens: int, card: Card, code: str) -> Iterator[float]:
    """Yield the seconds of the passes in front of a block's quantized products: P with quantization, TAC.

    Two of them hold the norm, one SwiGLU.
    """
    of_down = 2 if code == "new" else 1  # gate and up, of which SwiGLU's product is made in the same pass
    for width, reads in ((shape.hidden, 1), (shape.hidden, 1), (shape.hidden, 1), (shape.inner, of_down)):
        plain = _moved(tokens, card, reads * width, width)
        yield plain if precision == "w4a4-plain" else max(plain, _transform(width, tokens, card, code))
    if precision == "w4a4":
        rate, wave = (OLD["tac"], OLD["wave"]) if code == "old" else (card.copy * PASS, NEW_WAVE)
        yield max(4.0 * tokens * shape.hidden / rate, wave)


def _transform(width: int, tokens: int, card: Card, code: str) -> float:
    """Return the seconds of a Kronecker P in front of quantization, from its operations in padded tiles."""
    a, b = kronecker_sizes(width)
    if code == "old":  # powers of two in one direction, steps of 32 in the other
        tile_a, tile_b = (max(16, 1 << (n - 1).bit_length()) for n in (a, b))
        steps_a, steps_b = (-(-n // 32) * 32 for n in (a, b))
        operations = 2.0 * tokens * (steps_a * tile_b * steps_b + tile_a * tile_b * steps_a)
        return max(operations / OLD["small" if tile_a * tile_b <= 4096 else "large"], OLD["wave"])
    tile_a, columns = row_tiles(*((b, a) if is_turned(a, b) else (a, b)))
    operations = 2.0 * tokens * tile_a * sum(columns) * (tile_a + sum(columns))
    return max(operations / (card.bf16 * NEW_PRODUCTS), NEW_WAVE)


def against_measured(card: Card, code: str) -> list[Line]:
    """Return the compiled forwards that were measured with some kernels, beside what is predicted of them."""
    rows = json.loads(MEASURED[code].read_text(encoding="utf-8"))["rows"]
    lines: list[Line] = []
    for row in rows:
        if row["launch"] == "compiled" and row["kind"] == "forward" and row["precision"] in ("bf16", "w4a4"):
            ms = forward(row["model"], row["precision"], row["tokens"], card, code)
            line = {key: row[key] for key in ("model", "precision", "tokens")} | {"measured ms": row["ms"]}
            lines.append(line | {"predicted ms": round(ms, 1), "error": f"{ms / row['ms'] - 1:+.0%}"})
    return lines


def of_this_code(card: Card) -> list[Line]:
    """Return what forwards of this code should take, and their gain over bf16."""
    lines: list[Line] = []
    for family in SHAPES:
        for tokens in TOKENS:
            times = {p: forward(family, p, tokens, card, "new") for p in ("bf16", "w4a4-plain", "w4a4")}
            line = {"model": family, "tokens": tokens} | {f"{p} ms": round(ms, 1) for p, ms in times.items()}
            line["gain"] = f"{times['bf16'] / times['w4a4']:.2f}x"
            parts = by_part(family, "w4a4", tokens, card, "new")
            line |= {f"of w4a4: {name}": f"{ms / times['w4a4']:.0%}" for name, ms in parts.items() if name != "head"}
            kernels = (str(launches(family, p, tokens, card)) for p in ("bf16", "w4a4"))
            lines.append(line | {"kernels a block, bf16 / w4a4": " / ".join(kernels)})
    return lines


def report(name: str) -> str:
    """Return both tables as Markdown."""
    card = CARDS[name]
    old = "kernels of afb57db, compiled forwards: measured and predicted", against_measured(card, "old")
    run = "kernels of ff3536c, compiled forwards: measured and predicted", against_measured(card, "new")
    new = "this code, compiled forwards of one sequence: predicted, not measured", of_this_code(card)
    return "\n\n".join(f"{name}, {title}\n\n{_table(lines)}" for title, lines in (old, run, new))


def _table(lines: list[Line]) -> str:
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
