"""Figures from records and reports, readable in grayscale, as PNG and PDF.

python -m starquant.reports.figures trajectory "no TAC=A.json" "TAC=B.json" --out results/figure3
python -m starquant.reports.figures activations activations.json --site qkv_input --out results/figure1
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from starquant.errors import ConfigError, RecordError, one_line_errors, user_path
from starquant.reports.across_seeds import Row
from starquant.statistics.bootstrap import bootstrap, crossed_bootstrap
from starquant.store.items import read_raw
from starquant.store.records import read_record
from starquant.store.verification import is_intact, validate_items

STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "x")


def trajectory(records: Sequence[tuple[str, Path]], metric: str = "hidden_mse") -> Figure:
    """Draw a fidelity metric at every denoising step, with 95 % intervals over prompts (the paper's figure 3).

    Args:
        records: (label, record) pairs, one line each; records of one label are averaged over, prompt by prompt.
        metric: of the fidelity items.

    Raises:
        RecordError: a record without fidelity items, or without the metric.
    """
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    labels = list(dict.fromkeys(label for label, _ in records))
    for index, label in enumerate(labels):
        own = [path for name, path in records if name == label]
        numbers = by_step(own, metric)
        steps = sorted(numbers)
        try:
            intervals = [bootstrap(numbers[step]) for step in steps]
        except ValueError as error:
            raise RecordError(f"{own[0]}: {metric}: {error}") from None
        shade = str(0.65 * index / max(1, len(labels) - 1))
        marks: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "linestyle": STYLES[index % len(STYLES)]}
        axes.plot([s + 1 for s in steps], [f.mean for f in intervals], label=label, color=shade, markersize=4, **marks)
        axes.fill_between(
            [s + 1 for s in steps], [f.low for f in intervals], [f.high for f in intervals], color=shade, alpha=0.15
        )
    axes.set(xlabel="denoising step", ylabel=f"{metric} against full precision", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def by_step(paths: Sequence[Path], metric: str) -> dict[int, list[float]]:
    """Return, for every step, one value a prompt: the mean over the records; raises RecordError where there is none."""
    cells: dict[int, dict[int, list[float]]] = {}
    for path in paths:
        validate_items(path, read_record(path), whole=True)
        for row in read_raw(path, "fidelity"):
            if row.get("step") is not None and isinstance(row.get(metric), int | float):
                cells.setdefault(row["step"], {}).setdefault(row["prompt"], []).append(float(row[metric]))
    if not cells:
        raise RecordError(f"{paths[0]}: its fidelity items have no {metric} at denoising steps")
    return {step: [sum(v) / len(v) for v in prompts.values()] for step, prompts in cells.items()}


def activations(report: dict[str, Any], site: str) -> Figure:
    """Draw, a block a row: histograms of both token states, and the largest magnitude of every channel (figure 1).

    Raises:
        RecordError: no such site in the report.
    """
    rows = [row for row in report["rows"] if row["site"] == site]
    if not rows:
        known = ", ".join(dict.fromkeys(row["site"] for row in report["rows"]))
        raise RecordError(f"--site: got '{site}', allowed: {known}")
    figure, grid = plt.subplots(len(rows), 2, figsize=(7.5, 1.9 * len(rows)), layout="constrained", squeeze=False)
    for (left, right), row in zip(grid, rows, strict=True):
        for state, shade, style in (("masked", "0.0", "-"), ("unmasked", "0.55", "--")):
            _histogram(left, row[state], report["half_range"], state, shade, style)
            right.plot(row[state]["channel_absmax"], style, color=shade, linewidth=0.9, label=state)
        left.set(yscale="log", ylabel=f"block {row['block']}")
        right.set(xlim=(0, row["width"] - 1))
    figure.suptitle(site)
    grid[0][0].set_title("density")
    grid[0][1].set_title("largest magnitude")
    grid[-1][0].set_xlabel("value / RMS of its token state")
    grid[-1][1].set_xlabel("channel")
    grid[0][0].legend(frameon=False)
    return figure


def divergence(rows: Sequence[Row], bits: str = "w4a4") -> Figure:
    """Draw the KL to full precision of every method at one bit-width, on text and on tasks, with 95 % intervals.

    Args:
        rows: of `seed_tables`.
        bits: name of the bit-width; where no row has it, the first row's.
    """
    own = [row for row in rows if row.label[0] == bits] or [row for row in rows if row.label[0] == rows[0].label[0]]
    figure, axes = plt.subplots(figsize=(6.0, 0.9 + 0.32 * len(own)), layout="constrained")
    for offset, (group, shade, marker) in enumerate((("text", "0.0", "o"), ("tasks", "0.55", "s"))):
        intervals = [crossed_bootstrap(row.numbers((f"fidelity_{group}", "kl"))) for row in own]
        means = [interval.mean for interval in intervals]
        spread = [[f.mean - f.low for f in intervals], [f.high - f.mean for f in intervals]]
        places = [index + 0.14 * (2 * offset - 1) for index in range(len(own))]
        axes.errorbar(means, places, xerr=spread, fmt=marker, color=shade, label=group, markersize=5, linewidth=1)
    axes.set(xscale="log", xlabel=f"KL to full precision at {own[0].label[0]}, nats", yticks=range(len(own)))
    axes.set_yticklabels([row.label[-1] for row in own])
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.legend(frameon=False)
    return figure


def _histogram(axes: Axes, report: dict[str, Any], half: float, label: str, shade: str, style: str) -> None:
    density = report["density"]
    centres = [(i + 0.5) * 2 * half / len(density) - half for i in range(len(density))]
    axes.plot(centres, [x or math.nan for x in density], style, color=shade, linewidth=1.1, label=label)


def save(figure: Figure, out: Path) -> list[Path]:
    """Write OUT.png and OUT.pdf; returns their paths."""
    paths = [out.with_name(out.name + suffix) for suffix in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path, dpi=160, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    plt.close(figure)
    return paths


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
