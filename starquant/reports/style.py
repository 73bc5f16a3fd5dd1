"""The one look of figures: sizes for a paper's column, colours, and terms in place of keys.

Lines and points differ in lightness, dash and marker: they are told apart by a colour-blind reader, and in grey.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import matplotlib

matplotlib.use("Agg")
from matplotlib import colormaps, pyplot
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "savefig.dpi": 160,
    "pdf.fonttype": 42,  # TrueType: journals refuse matplotlib's default, type 3
    "svg.fonttype": "none",
}
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "X")
#: Of cividis, whose lightness rises evenly; beyond it is too pale on white.
LIGHTEST = 0.8

METRICS = {
    "kl": "KL divergence from full precision (nats)",
    "hidden_mse": "relative squared error of the last hidden state",
    "top1_agreement": "top-1 agreement with full precision",
    "confidence_drift": "absolute change of confidence",
    "confidence_bias": "change of confidence",
    "commit_flips": "share of committed tokens that differ",
    "answer_flips": "share of answers that differ",
}
SITES = {
    "qkv_input": "input of the query, key and value projections",
    "out_input": "input of the attention's output projection",
    "gate_up_input": "input of the gate and up projections",
    "down_input": "input of the down projection",
}
GROUPS = {"text": "held-out text", "tasks": "tasks' answers"}


class ShownFigure(Figure):
    """A figure that a notebook shows as an image, whatever backend is in use."""

    def _repr_png_(self) -> bytes:
        with matplotlib.rc_context(STYLE), io.BytesIO() as stream:
            self.savefig(stream, format="png")
            return stream.getvalue()


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Let a function draw, or write, in the one look."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[ShownFigure, Any]:
    """Return a figure of so many inches and its axes, [rows, columns]; pyplot forgets it, so that none is left open."""
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(width, height),
        layout="constrained",
        squeeze=False,
        FigureClass=ShownFigure,
        **options,
    )
    pyplot.close(figure)
    assert isinstance(figure, ShownFigure)
    return figure, axes


def colour(index: int, of: int) -> str:
    """Return the colour of one of several lines, from dark to light."""
    return to_hex(colormaps["cividis"](LIGHTEST * index / max(1, of - 1)))


def look(index: int, of: int) -> dict[str, Any]:
    """Return colour, dash and marker of one of several lines."""
    kind = {"linestyle": DASHES[index % len(DASHES)], "marker": MARKERS[index % len(MARKERS)]}
    return {"color": colour(index, of), **kind}


def term(name: str) -> str:
    """Return what a reader calls a metric, site or group of prompts; what has no term keeps its words."""
    return (METRICS | SITES | GROUPS).get(name, name.replace("_", " "))


def bits_term(name: str) -> str:
    """Return a bit-width as papers write it: w4a4 as W4A4; a preset of another name keeps it."""
    return name.upper() if re.fullmatch("w[0-9]+a[0-9]+", name) else name
