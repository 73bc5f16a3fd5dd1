"""Tables: seconds to build all of them from many records, in a fresh process.

Records are fabricated from one published record: methods x models x model seeds x rotation seeds, 512 items a task.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import machine

from starquant.reports.definitions import FULL, TABLES
from starquant.store.source import read_file, record_paths

SOURCE = Path(__file__).resolve().parents[1] / "results" / "published" / "testbed_methods"
ITEMS = 512


def fabricate(folder: Path, count: int) -> int:
    """Write at least `count` records that fill every row of every table; returns how many."""
    template = json.loads(read_file(next(p for p in record_paths(SOURCE) if "tiny-w4a4-star_quant-" in p.name)))
    rows = {json.dumps(row.where, sort_keys=True): row.where for d in TABLES.values() for row in d.rows}
    wheres = [where for where in rows.values() if where != FULL]
    rotations = -(-count // (len(wheres) * 3))
    number = 0
    for where, seed, rotation in itertools.product(wheres, range(3), range(rotations)):
        _write(folder, template, where | {"model.seed": seed, "method.rotation_seed": rotation}, number)
        number += 1
    for seed in range(3):
        _write(
            folder, template, FULL | {"bits.name": "w16a16", "model.seed": seed, "method.rotation_seed": None}, number
        )
        number += 1
    return number


def _write(folder: Path, template: dict[str, Any], changes: dict[str, Any], number: int) -> None:
    record = json.loads(json.dumps(template))
    for dotted, value in changes.items():
        here = record["spec"]
        *path, last = dotted.split(".")
        for key in path:
            here = here.setdefault(key, {})
        here[last] = value
    record["digest"] = f"{number:016x}"
    name = f"tiny-{number:016x}"
    items = folder / f"{name}.items"
    items.mkdir()
    draw = random.Random(number)
    tasks = {
        score["task"]: {
            "items": score["task"],
            "n": ITEMS,
            "values": {f"{score['metric']},{score['filter']}": [int(draw.random() < 0.8) for _ in range(ITEMS)]},
        }
        for score in record["scores"]
        if score["task"] != "fidelity"
    }
    tasks["fidelity"] = {"items": "f", "n": 256, "values": {"kl,none": [draw.random() for _ in range(256)]}}
    (items / "columns.json").write_text(json.dumps({"schema_version": 1, "tasks": tasks}))
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1000)
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records"
        records.mkdir()
        count = fabricate(records, arguments.records)
        size = sum(path.stat().st_size for path in records.glob("*.json")) / 1e6
        for _ in range(3):
            began = time.perf_counter()
            command = [sys.executable, "-m", "starquant.reports", *TABLES, "--records", folder, "--out", folder]
            subprocess.run(command, check=True, capture_output=True)
            print(f"{len(TABLES)} tables from {count} records ({size:.0f} MB): {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    main()
