"""A forecast as text."""

from __future__ import annotations

from dataclasses import replace

from starquant.forecast.costs import Stage
from starquant.forecast.forecast import Forecast
from starquant.reports.durations import in_time
from starquant.reports.text import aligned

HEADER = ("stage", "", "passes", "tokens", "operations", "time")


def render(forecast: Forecast) -> str:
    """Return a table of the stages, and lines of what is held and written."""
    rows = [
        HEADER,
        *(row for stage in forecast.stages for row in _rows(stage)),
        ("total", "", "", "", "", in_time(forecast.seconds)),
    ]
    lines = [f"forecast: {forecast.name}", *aligned(rows)]
    for name, sizes in (("memory", forecast.memory), ("disk", forecast.disk)):
        if sizes:
            lines.append(f"{name}: " + ", ".join(f"{in_bytes(size)} {what}" for what, size in sizes.items()))
    return "\n".join([*lines, f"nothing was computed or written; the forecast took {in_time(forecast.took)}"])


def _rows(stage: Stage) -> list[tuple[str, ...]]:
    """Return the line of a stage, and of its parts where it has several."""
    parts = stage.parts if len(stage.parts) > 1 else ()
    return [_row(stage), *(_row(replace(part, name=f"  {part.name}")) for part in parts)]


def _row(stage: Stage) -> tuple[str, ...]:
    if stage.reused:
        return (stage.name, "there already", "", "", "", "")
    counts = [f"{number:.3g}" if number else "" for number in (stage.tokens, stage.operations)]
    return (stage.name, "", f"{stage.passes:,.0f}" if stage.passes else "", *counts, in_time(stage.seconds))


def in_bytes(size: float) -> str:
    """Return bytes in MB or GB."""
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
