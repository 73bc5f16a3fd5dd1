"""What `stage=inspect` found, as a table: masked (m) and unmasked (u) tokens at every block and site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starquant.reports.figures import read_report
from starquant.reports.text import aligned

STATES = ("masked", "unmasked")
#: Column -> (key of a token state's report, number format).
COLUMNS = {
    "absmax": ("absmax", ".1f"),
    "absmax/rms of a token": ("crest", ".1f"),
    "energy of 16 directions": ("top_energy", ".0%"),
    "of one channel": ("channel_share", ".0%"),
    "largest token / mean": ("token_ratio", ".1f"),
}


def render(path: Path) -> str:
    """Return a report as text: extremes, how few directions hold the energy, whether the states share them.

    Raises:
        RecordError: it is damaged.
    """
    report = read_report(path)
    header = ["block", "site", *(f"{name} {state[0]}" for name in COLUMNS for state in STATES), "overlap"]
    header += ["below noise: m only", "u only", "both"]
    lines = [header, *(_line(row) for row in report["rows"])]
    legend = [
        "m masked, u unmasked tokens; overlap: 1 where both states' 16 directions are the same",
        "below noise: directions in which a state has less energy than rounding to 4 bits adds. A gate costs nothing",
        "in those of one state only; those of both need none.",
    ]
    return "\n".join(["", f"{report['name']}: activations", *aligned(lines, ruled=True), *legend])


def _line(row: Mapping[str, Any]) -> list[str]:
    cells = [_number(row[state].get(key), shape) for key, shape in COLUMNS.values() for state in STATES]
    idle = row.get("idle_directions") or {}  # early reports have none
    counts = [_number(idle.get(name), ".0f") for name in (*STATES, "both")]
    return [str(row["block"]), row["site"], *cells, _number(row.get("overlap"), ".2f"), *counts]


def _number(value: float | None, shape: str) -> str:
    return "" if value is None else f"{value:{shape}}"
