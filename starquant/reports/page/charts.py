"""The charts of a page as Vega-Lite, by altair; colours of Okabe and Ito, dashes and shapes for those who see grey."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from starquant.errors import ConfigError
from starquant.reports.page.fidelity import Point
from starquant.reports.page.rows import PageRow
from starquant.reports.page.table import MEAN, TERMS, Shown
from starquant.store.cache import cache_folder
from starquant.store.files import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 4], [1, 4])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
#: What Vega draws in the page's own colour, in light, in dark and on paper.
CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": "currentColor", "strokeOpacity": 0.25},
    "axis": {
        **{name: "currentColor" for name in ("labelColor", "titleColor", "tickColor", "domainColor", "gridColor")},
        "gridOpacity": 0.15,
        "labelLimit": 320,
    },
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor", "labelLimit": 320, "symbolLimit": 60},
    "header": {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontWeight": "bold"},
    "title": {"color": "currentColor"},
}
INSTALL = "charts need altair: pip install 'starquant[report]'"


def charts(
    rows: Sequence[PageRow],
    table: dict[str, Any],
    shown: Sequence[Shown],
    ratios: Sequence[Point],
    steps: tuple[Sequence[Point], Sequence[Point]],
    sqnr: Sequence[dict[str, Any]],
    activations: Sequence[dict[str, Any]] = (),
) -> dict[str, dict[str, Any]]:
    """Return the charts that there is something to draw for, by the name of their place on the page.

    Raises:
        ConfigError: altair is not installed.
    """
    try:
        import altair
    except ModuleNotFoundError:
        raise ConfigError(INSTALL) from None
    names = [row.name for row in rows]
    with _without_notices():
        drawn = {
            "scores": _scores(altair, names, table, shown),
            "bits": _bits(altair, rows, table, shown),
            "ratios": _curves(altair, names, ratios, "mask ratio", quantitative=True),
            "steps": _curves(altair, names, steps[0], "denoising step", quantitative=False),
            "parted": _parted(altair, names, steps[1]),
            "sqnr": _heat_map(altair, sqnr),
            "activations": _densities(altair, activations),
        }
    return {name: chart.to_dict() for name, chart in drawn.items() if chart is not None}


@contextmanager
def _without_notices() -> Iterator[None]:
    """Keep altair's notice to itself that charts side by side share one selection, which is what is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Automatically deduplicated selection")
        yield


def _data(altair: Any, points: Sequence[Point]) -> Any:
    return altair.Data(values=[*points])


def _scales(altair: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the channels that tell rows apart: the same row looks the same in every chart."""
    size = len(COLOURS)
    colours = [COLOURS[index % size] for index in range(len(names))]
    dashes = [DASHES[index // size % len(DASHES)] for index in range(len(names))]
    legend = altair.Legend(title=None, orient="bottom", columns=2)
    scale = altair.Scale(domain=[*names], range=colours)
    return {
        "color": altair.Color("row:N", scale=scale, legend=legend),
        "strokeDash": altair.StrokeDash("row:N", scale=altair.Scale(domain=[*names], range=dashes), legend=legend),
    }


def _scores(altair: Any, names: Sequence[str], table: dict[str, Any], shown: Sequence[Shown]) -> Any:
    bits = sorted({row["bits"] for row in table["rows"]})
    shapes = [SHAPES[index % len(SHAPES)] for index in range(len(bits))]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(bits))]
    colour = altair.Color("bits:N", scale=altair.Scale(domain=bits, range=colours))
    panels = []
    for place, one in enumerate(shown):
        points = [
            {"row": name, "bits": row["bits"], **cell}
            for name, row in zip(names, table["rows"], strict=True)
            if (cell := row["cells"][place]) is not None
        ]
        if points:
            x = altair.X("mean:Q", title=f"{one.name}, {one.unit}", scale=_scale(altair, points, one.column[1] == "kl"))
            base = altair.Chart(_data(altair, points)).encode(y=altair.Y("row:N", sort=[*names], title=None))
            ends = base.mark_rule(strokeWidth=1.5).encode(x=altair.X("low:Q"), x2="high:Q", color=colour)
            dots = base.mark_point(filled=True, size=60).encode(
                x=x,
                color=colour,
                shape=altair.Shape("bits:N", scale=altair.Scale(domain=bits, range=shapes)),
                tooltip=["row:N", "mean:Q", "low:Q", "high:Q", "n:Q"],
            )
            panels.append((ends + dots).properties(width=300))
    return altair.concat(*panels, columns=2) if panels else None


def _scale(altair: Any, points: Sequence[Point], logarithmic: bool) -> Any:
    """Return the scale of figures with their intervals: a logarithmic one where that is wanted and all are positive."""
    numbers = [point[end] for point in points for end in ("mean", "low", "high") if point[end] is not None]
    return altair.Scale(type="log") if logarithmic and min(numbers) > 0 else altair.Scale(zero=False)


def _bits(altair: Any, rows: Sequence[PageRow], table: dict[str, Any], shown: Sequence[Shown]) -> Any:
    """Return figures against bits, a line a method, where methods were run at several."""
    parts = ("bits.weights.bits", "bits.activations.bits")
    widths = {row.bits: sum(row.runs[0].get(part) for part in parts) for row in rows}
    own = [index for index, row in enumerate(rows) if not row.is_full_precision]
    labels = [rows[index].label for index in own]
    several = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    places = [place for place, one in enumerate(shown) if one.column == MEAN or one.column[1] == "kl"]
    panels = []
    for place in places or range(min(1, len(shown))):
        points = [
            {"row": rows[index].label, "x": rows[index].bits, **cell}
            for index in own
            if rows[index].label in several and (cell := table["rows"][index]["cells"][place]) is not None
        ]
        if points:
            order = sorted({point["x"] for point in points}, key=lambda bits: (widths[bits], bits))
            title = f"{shown[place].name}, {shown[place].unit}"
            base = altair.Chart(_data(altair, points)).encode(
                x=altair.X("x:O", sort=order, title="bits"), **_scales(altair, several)
            )
            ends = base.mark_rule(opacity=0.5).encode(y=altair.Y("low:Q", title=title), y2="high:Q")
            lines = base.mark_line(point=True).encode(
                y=altair.Y("mean:Q", title=title, scale=_scale(altair, points, shown[place].column[1] == "kl")),
                tooltip=["row:N", "x:O", "mean:Q", "low:Q", "high:Q"],
            )
            panels.append((ends + lines).properties(width=300, height=220))
    return altair.concat(*panels, columns=2) if panels else None


def _densities(altair: Any, points: Sequence[dict[str, Any]]) -> Any:
    """Return histograms of the token states, block by block, of the report and site that are chosen."""
    if not points:
        return None
    chosen = []
    for name in ("report", "site"):
        values = list(dict.fromkeys(point[name] for point in points))
        bind = altair.binding_select(options=values, name=f"{name} ")
        chosen.append(altair.param(name=f"shown_{name}", value=values[0], bind=bind))
    states = list(dict.fromkeys(point["state"] for point in points))
    tones, dashes = list(COLOURS[: len(states)]), list(DASHES[: len(states)])
    chart = (
        altair.Chart(_data(altair, points))
        .mark_line()
        .encode(
            x=altair.X("x:Q", title="value / RMS of its token state"),
            y=altair.Y("density:Q", title="density", scale=altair.Scale(type="log")),
            color=altair.Color("state:N", scale=altair.Scale(domain=states, range=tones), title="tokens"),
            strokeDash=altair.StrokeDash("state:N", scale=altair.Scale(domain=states, range=dashes)),
        )
    )
    chart = chart.transform_filter("datum.report === shown_report && datum.site === shown_site")
    order = list(dict.fromkeys(point["block"] for point in points))
    facet = altair.Facet("block:N", title=None, sort=order)
    return chart.properties(width=200, height=130).facet(facet=facet, columns=4).add_params(*chosen)


def _curves(altair: Any, names: Sequence[str], points: Sequence[Point], title: str, quantitative: bool) -> Any:
    if not points:
        return None
    own = [name for name in names if any(point["row"] == name for point in points)]
    chosen = altair.selection_point(name="followed", fields=["row"], bind="legend")
    x = (
        altair.X("x:Q", title=title, scale=altair.Scale(domain=[0, 1]))
        if quantitative
        else altair.X("x:O", title=title)
    )
    charts = []
    for metric, (term, unit, _) in TERMS.items():
        values = [point for point in points if point["metric"] == metric]
        if values:
            base = altair.Chart(_data(altair, values)).encode(x=x, **_scales(altair, own))
            has_ends = any(point["low"] is not None for point in values)
            y = altair.Y("mean:Q", title=f"{term}, {unit}", scale=_scale(altair, values, metric == "kl"))
            bars = base.mark_rule(opacity=0.5).encode(y=altair.Y("low:Q", title=f"{term}, {unit}"), y2="high:Q")
            lines = base.mark_line(point=True).encode(
                y=y,
                opacity=altair.condition(chosen, altair.value(1), altair.value(0.12)),
                tooltip=["row:N", "x:Q", "mean:Q", "low:Q", "high:Q"],
            )
            bars = bars.encode(opacity=altair.condition(chosen, altair.value(0.5), altair.value(0.05)))
            charts.append((bars + lines if has_ends else lines).properties(width=300, height=220))
    return altair.concat(*charts, columns=2).add_params(chosen)


def _parted(altair: Any, names: Sequence[str], points: Sequence[Point]) -> Any:
    if not points:
        return None
    own = [name for name in names if any(point["row"] == name for point in points)]
    chart = altair.Chart(_data(altair, points)).mark_line(point=True)
    return chart.encode(
        x=altair.X("x:O", title="denoising step"),
        y=altair.Y("mean:Q", title="prompts with another token committed by then, %"),
        tooltip=["row:N", "x:O", "mean:Q"],
        **_scales(altair, own),
    ).properties(width=420, height=220)


def _heat_map(altair: Any, points: Sequence[dict[str, Any]]) -> Any:
    if not points:
        return None
    rows = list(dict.fromkeys(point["row"] for point in points))
    order = list(dict.fromkeys(point["what"] for point in points))
    chosen = altair.param(name="shown", value=rows[0], bind=altair.binding_select(options=rows, name="row "))
    scale = altair.Scale(scheme="viridis", domain=[min(p["db"] for p in points), max(p["db"] for p in points)])
    return (
        altair.Chart(_data(altair, points))
        .mark_rect()
        .encode(
            x=altair.X("block:O", title="block"),
            y=altair.Y("what:N", sort=order, title=None),
            color=altair.Color("db:Q", title="SQNR, dB", scale=scale),
            tooltip=["row:N", "what:N", "block:O", "db:Q"],
        )
        .transform_filter("datum.row === shown")
        .add_params(chosen)
        .properties(width={"step": 22}, height={"step": 18})
    )


@functools.cache
def vega() -> str:
    """Return the scripts that draw charts, 0.9 MB; raises ConfigError where they are not installed.

    They are put together once, in seconds, and kept in the user's cache where that can be written.
    """
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise ConfigError(INSTALL) from None
    name = f"vega-{version('vl-convert-python')}.js"
    with contextlib.suppress(OSError, ValueError, ConfigError):
        return (cache_folder() / name).read_text(encoding="utf-8")
    bundle: Any = vl_convert.javascript_bundle  # its stub wants a script of ours beside those that draw
    scripts = str(bundle())
    with contextlib.suppress(OSError, ConfigError):
        write_atomically(cache_folder() / name, scripts)
    return scripts
