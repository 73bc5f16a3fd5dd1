"""Table 4 from measurements of benchmarks/efficiency.py, the paper's figures beside it.

python -m starquant.reports.efficiency results/published/efficiency
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from starquant.errors import RecordError, StarquantError, user_path
from starquant.reports.comparison import markdown
from starquant.reports.definitions import PAPER

NAMES = {"llada": "LLaDA-8B", "dream": "Dream-7B"}
WITHOUT = {"transforms": "w4a4-plain", "gates": "w4a4-no-gates", "TAC": "w4a4-no-tac"}  # part -> W4A4 without it
KEYS = ("device", "model", "ends", "kind", "batch", "tokens")


def read(folder: Path) -> pd.DataFrame:
    """Return one row a measurement of the published shapes.

    Raises:
        RecordError: no measurement, a damaged one.
    """
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such folder; benchmarks/efficiency.py --device cuda --out makes one")
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            device = content["device"] + (f" (code {content['code']}, by hand)" if "entered" in content else "")
            rows += [{"device": device} | row for row in content["rows"] if row["shape"] == "8b"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path}: not readable as a measurement ({type(error).__name__}: {error})") from None
    if not rows:
        raise RecordError(
            f"{folder}: holds no measurement of 8B shapes; benchmarks/efficiency.py --device cuda makes one"
        )
    return pd.DataFrame(rows)


def table(measurements: pd.DataFrame) -> pd.DataFrame:
    """Return milliseconds, speed and memory of each precision's fastest launch against bf16's, by batch and length.

    `transforms` is the share of a forward that online transforms, gates and TAC take together, `gates` and `TAC` their
    own: by how much it is shorter without them. `J` is the energy of a forward, where the card reports it.
    """
    lines = []
    for key, rows in measurements.groupby(list(KEYS), sort=False):
        by: dict[str, dict[Any, Any]] = {}
        for row in rows.to_dict("records"):  # the fastest launch of each precision
            if row["ms"] < by.get(row["precision"], row | {"ms": math.inf})["ms"]:
                by[row["precision"]] = row
        base = by.get("bf16")
        for precision, row in by.items():
            line = dict(zip(KEYS, key, strict=True)) | {
                "precision": precision,
                "launch": row["launch"],
                "ms": f"{row['ms']:.2f}",
            }
            line["tokens/s"] = f"{row['tokens_per_s']:.0f}"
            line["speed"] = "" if base is None else f"{base['ms'] / row['ms']:.2f}x"
            peak, of_base = _peak(row), None if base is None else _peak(base)
            line["peak GB"] = "" if peak is None else f"{peak:.2f}"
            line["memory"] = "" if peak is None or of_base is None else f"{of_base / peak:.2f}x"
            for part, without in WITHOUT.items():  # under one launch: launches differ by more than parts do
                compared = precision == "w4a4" and by.get(without, row | {"launch": None})["launch"] == row["launch"]
                line[part] = f"{1 - by[without]['ms'] / row['ms']:.1%}" if compared else ""
            share = row.get("of_roofline")
            line["of roofline"] = "" if pd.isna(share) else f"{share:.2f}"
            line["J"] = "" if pd.isna(energy := row.get("joules")) else f"{energy:.2f}"
            lines.append(line)
    return pd.DataFrame(lines).replace({"model": NAMES})


def parts(measurements: pd.DataFrame) -> pd.DataFrame:
    """Return milliseconds by part of the forwards that were taken apart: by module where Python launched them, else by
    kernel; empty for none.
    """
    if "parts_ms" not in measurements:
        return pd.DataFrame()
    taken = [row for row in measurements.to_dict("records") if isinstance(row["parts_ms"], dict)]
    lines = [{key: row[key] for key in (*KEYS, "precision", "launch")} | row["parts_ms"] for row in taken]
    return pd.DataFrame(lines).replace({"model": NAMES}).fillna("")


def _peak(row: Mapping[Any, Any]) -> float | None:
    """Return weights and what the forward adds to them, GB; None where it was not kept."""
    if pd.isna(row["resident_bytes"]):
        return None
    added = row.get("activation_mib")
    return float(row["resident_bytes"] + (0.0 if pd.isna(added) else added * 2**20)) / 1e9


def papers() -> pd.DataFrame:
    """Return the paper's figures, marked as such."""
    return pd.read_csv(PAPER / "table4_efficiency.csv").assign(source="paper (arXiv 2606.04945)").fillna("")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables; returns 2 after bad input, the paper's figures printed all the same."""
    parser = argparse.ArgumentParser(prog="python -m starquant.reports.efficiency", description=__doc__)
    parser.add_argument("folder", type=user_path, help="folder of JSON files that benchmarks/efficiency.py wrote")
    folder = parser.parse_args(arguments).folder
    failed = 0
    try:
        measurements = read(folder)
        print("Measured\n\n" + markdown(table(measurements)))
        if len(parts(measurements)):
            print("\nParts of a forward, ms\n\n" + markdown(parts(measurements)))
    except StarquantError as error:
        print(f"error: {error}", file=sys.stderr)
        failed = 2
    print("\nThe paper's figures\n\n" + markdown(papers()))
    return failed


if __name__ == "__main__":
    sys.exit(main())
