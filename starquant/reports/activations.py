"""What `stage=inspect` found, as a table: the token states of a model at every block and site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starquant.reports.figures import read_report, states_of
from starquant.reports.text import aligned

#: Signs of token states in a header.
SIGNS = {"masked": "m", "unmasked": "u", "committed": "c", "edited": "e", "context": "x"}
#: SGAT's groups.
GROUPS = ("masked", "unmasked")
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
    states = states_of(report)
    header = ["block", "site", *(f"{name} {SIGNS[state]}" for name in COLUMNS for state in states), "overlap"]
    header += ["below noise: m only", "u only", "both"]
    lines = [header, *(_line(row, states) for row in report["rows"])]
    named = ", ".join(f"{SIGNS[state]} {state}" for state in states)
    others = "" if "unmasked" in states else "; u all that are not masked"
    legend = [
        f"{named} tokens{others}; overlap: 1 where both groups' 16 directions are the same",
        "below noise: directions in which a state has less energy than rounding to 4 bits adds. A gate costs nothing",
        "in those of one state only; those of both need none.",
    ]
    return "\n".join(["", f"{report['name']}: activations", *aligned(lines, ruled=True), *legend])


def _line(row: Mapping[str, Any], states: Sequence[str]) -> list[str]:
    cells = [_number(row.get(state, {}).get(key), shape) for key, shape in COLUMNS.values() for state in states]
    idle = row.get("idle_directions") or {}  # early reports have none
    counts = [_number(idle.get(name), ".0f") for name in (*GROUPS, "both")]
    return [str(row["block"]), row["site"], *cells, _number(row.get("overlap"), ".2f"), *counts]


def _number(value: float | None, shape: str) -> str:
    return "" if value is None else f"{value:{shape}}"
