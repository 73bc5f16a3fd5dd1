"""Figures from records and reports, in the one look of `reports.style`, as PNG and PDF.

python -m starquant.reports.figures trajectory "no TAC=A.json" "TAC=B.json" --out results/figure3
python -m starquant.reports.figures activations activations.json --site qkv_input --out results/figure1
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from starquant.errors import ConfigError, RecordError, one_line_errors, user_path
from starquant.reports.frame import by_step, steps_frame
from starquant.reports.run import Run
from starquant.reports.samples import Row
from starquant.reports.style import GROUPS, bits_term, look, panels, styled, term
from starquant.statistics.bootstrap import bootstrap, crossed_bootstrap
from starquant.store.files import errors_of
from starquant.store.verification import is_intact

#: Name of the bit-width that `divergence` draws.
DRAWN_BITS = "w4a4"
#: Token states of any model; a report has some of them.
STATES = {
    "masked": "[MASK] tokens",
    "unmasked": "unmasked tokens",
    "committed": "committed tokens",
    "edited": "edited tokens",
    "context": "tokens of finished blocks",
}


@styled
def trajectory(records: Sequence[tuple[str, Path]], metric: str = "hidden_mse") -> Figure:
    """Draw a fidelity metric at every denoising step, with 95 % intervals over prompts (the paper's figure 3).

    Args:
        records: (label, record) pairs, one line each; records of one label are averaged over, prompt by prompt.
        metric: of the fidelity items.

    Raises:
        RecordError: a record without fidelity items, or without the metric.
    """
    figure, [[axes]] = panels(5.5, 3.4)
    labels = list(dict.fromkeys(label for label, _ in records))
    for index, label in enumerate(labels):
        own = [path for name, path in records if name == label]
        numbers = steps_of(own, metric)
        steps = sorted(numbers)
        try:
            intervals = [bootstrap(numbers[step]) for step in steps]
        except ValueError as error:
            raise RecordError(f"{own[0]}: {metric}: {error}") from None
        one, places = look(index, len(labels)), [step + 1 for step in steps]
        axes.plot(places, [f.mean for f in intervals], label=label, **one)
        low, high = [f.low for f in intervals], [f.high for f in intervals]
        axes.fill_between(places, low, high, color=one["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="denoising step", ylabel=term(metric), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def steps_of(paths: Sequence[Path], metric: str) -> dict[int, list[float]]:
    """Return, for every step, one value a prompt: the mean over the records; raises RecordError where there is none."""
    numbers = by_step(steps_frame([Run.read(path, whole=True) for path in paths]), metric)
    if not numbers:
        raise RecordError(f"{paths[0]}: its fidelity items have no {metric} at denoising steps")
    return numbers


@styled
def activations(report: dict[str, Any], site: str) -> Figure:
    """Draw, a block a row: histograms of the token states, and the largest magnitude of every channel (figure 1).

    Bars of a histogram are the report's bins, the outermost of which hold what lies beyond. Channels are points, not a
    line: they have no order.

    Raises:
        RecordError: no such site in the report.
    """
    rows = [row for row in report["rows"] if row["site"] == site]
    if not rows:
        known = ", ".join(dict.fromkeys(row["site"] for row in report["rows"]))
        raise RecordError(f"--site: got '{site}', allowed: {known}")
    states = states_of(report)
    figure, grid = panels(7.0, 0.9 + 1.5 * len(rows), len(rows), 2, sharex="col")
    for (left, right), row in zip(grid, rows, strict=True):
        for index, state in enumerate(name for name in states if name in row):
            one, label = look(index, len(states)), STATES[state]
            _histogram(left, row[state], report["half_range"], label, one)
            points = {"marker": one["marker"], "linestyle": "none", "color": one["color"], "rasterized": True}
            hollow: dict[str, Any] = {"markerfacecolor": "none"} if index else {}
            right.plot(row[state]["channel_absmax"], label=label, markersize=3, **points, **hollow)
        left.set(yscale="log", ylabel=f"block {row['block']}\nshare per RMS")
        right.set(xlim=(-1, row["width"]), ylim=(0, None), ylabel="largest |x|")
    figure.suptitle(term(site).capitalize())
    half = report["half_range"]
    grid[-1][0].set_xlabel(f"x / RMS of its state (outermost bins: beyond {half:g})")
    grid[-1][1].set_xlabel("channel (in no order)")
    figure.legend(*grid[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=len(states))
    return figure


@styled
def divergence(rows: Sequence[Row]) -> Figure:
    """Draw the KL to full precision of every method at one bit-width, on text and on tasks, with 95 % intervals.

    Args:
        rows: of `seed_tables`; those of `DRAWN_BITS` are drawn, or where there are none, of the first one's bits.
    """
    own = [row for row in rows if row.label[0] == DRAWN_BITS] or [
        row for row in rows if row.label[0] == rows[0].label[0]
    ]
    figure, [[axes]] = panels(6.0, 1.1 + 0.3 * len(own))
    for index, (group, label) in enumerate(GROUPS.items()):
        intervals = [crossed_bootstrap(row.numbers((f"fidelity_{group}", "kl"))) for row in own]
        means = [interval.mean for interval in intervals]
        spread = [[f.mean - f.low for f in intervals], [f.high - f.mean for f in intervals]]
        places = [number + 0.14 * (2 * index - 1) for number in range(len(own))]
        one = look(index, len(GROUPS)) | {"linestyle": "none"}
        axes.errorbar(means, places, xerr=spread, label=label, elinewidth=1, capsize=2, **one)
    width = bits_term(str(own[0].label[0]))
    axes.set(xscale="log", xlabel=f"KL from full precision at {width} (nats, 95 % intervals)", yticks=range(len(own)))
    axes.set_yticklabels([row.label[-1] for row in own])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=len(GROUPS))
    return figure


def _histogram(axes: Axes, report: dict[str, Any], half: float, label: str, one: dict[str, Any]) -> None:
    """Draw the bins as they are: steps, and a gap where no value lies."""
    density = np.array(report["density"])
    edges = np.linspace(-half, half, len(density) + 1)
    axes.stairs(
        np.where(density > 0, density, np.nan),
        edges,
        baseline=None,
        color=one["color"],
        linestyle=one["linestyle"],
        label=label,
    )


@styled
def save(figure: Figure, out: Path) -> list[Path]:
    """Write OUT.png and OUT.pdf; returns their paths; raises OSError."""
    png, pdf = (out.with_name(out.name + suffix) for suffix in (".png", ".pdf"))
    with errors_of(png):
        figure.savefig(png)
        without_alpha(png)
    with errors_of(pdf):
        figure.savefig(pdf, metadata={"CreationDate": None})
    plt.close(figure)
    return [png, pdf]


def without_alpha(png: Path) -> None:
    """Write a picture again without its alpha channel, which is opaque: the same pixels in an eighth less."""
    with Image.open(png) as picture:
        kept = PngInfo()
        for key, text in picture.info.items():
            if isinstance(text, str):
                kept.add_text(str(key), text)
        dpi, pixels = picture.info["dpi"], picture.convert("RGB")
    pixels.save(png, optimize=True, pnginfo=kept, dpi=dpi)


def _labelled(text: str) -> tuple[str, Path]:
    label, equals, path = text.rpartition("=")
    return (label, Path(path)) if equals else (Path(text).stem, Path(text))


def read_report(path: Path) -> dict[str, Any]:
    """Return a report of activations; raises RecordError when it is damaged or of another schema."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(report, dict) and "seal" in report and not is_intact(report):  # early ones have none
            raise ValueError("its content is not that of its seal")
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: not readable as a report of activations ({error})") from None
    if not isinstance(report, dict) or report.get("kind") != "activations" or report.get("schema_version") != 1:
        raise RecordError(f"{path}: not a report of activations, version 1")
    return report


def states_of(report: dict[str, Any]) -> list[str]:
    """Return the token states that a report has, in the order in which they are shown."""
    return [state for state in STATES if any(state in row for row in report["rows"])]


@one_line_errors(OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 2 after bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m starquant.reports.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    steps = kinds.add_parser("trajectory", help="a fidelity metric at every denoising step")
    steps.add_argument("records", nargs="+", type=_labelled, metavar="[LABEL=]RECORD.json")
    steps.add_argument("--metric", default="hidden_mse")
    sites = kinds.add_parser("activations", help="histograms and channel magnitudes of both token states")
    sites.add_argument("report", type=user_path)
    sites.add_argument("--site", default="qkv_input")
    for kind in (steps, sites):
        kind.add_argument("--out", type=user_path, required=True, help="path without suffix")
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir():
        raise ConfigError(f"--out: {options.out.parent} is no folder")
    if options.kind == "trajectory":
        figure = trajectory(options.records, options.metric)
    else:
        figure = activations(read_report(options.report), options.site)
    for path in save(figure, options.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
