"""Activations of the token states (the paper's figure 1), of the reports that lie beside records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starquant.reports.figures import read_report, states_of

#: Blocks of a report that are shown at most, evenly spread.
MOST_BLOCKS = 8


def densities(folder: Path) -> list[dict[str, Any]]:
    """Return a point a report, site, block, token state and bin of its histogram; none without reports.

    Values are in units of the RMS of their token state, densities those of the histogram.

    Args:
        folder: of results, with reports in `activations/`.

    Raises:
        RecordError: a report that is damaged.
    """
    points = []
    for path in sorted((folder / "activations").glob("*.json")):
        report = read_report(path)
        half, blocks = float(report["half_range"]), sorted({row["block"] for row in report["rows"]})
        shown = {blocks[round(i * (len(blocks) - 1) / (MOST_BLOCKS - 1))] for i in range(MOST_BLOCKS)}
        states = states_of(report)
        for row in report["rows"]:
            for state in (name for name in states if name in row and row["block"] in shown):
                density = row[state]["density"]
                points += [
                    {
                        "report": str(report["name"]),
                        "site": str(row["site"]),
                        "block": f"block {row['block']}",
                        "state": state,
                        "x": round((i + 0.5) * 2 * half / len(density) - half, 4),
                        "density": float(f"{height:.3g}"),
                    }
                    for i, height in enumerate(density)
                    if height > 0
                ]
    return points
