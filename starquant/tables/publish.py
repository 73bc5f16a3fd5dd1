"""Copy records with no more of their items than tables need: small enough to be committed.

    python -m starquant.tables.publish results/records results/published/NAME

Records are copied as they are. Of items, numbers stay (six digits) with what pairs them; texts go. Fidelity is averaged
over each prompt's steps, unless `--steps` keeps them (for figures along the trajectory).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from starquant.errors import ConfigError, RecordError, StarquantError
from starquant.records.store import read_record
from starquant.tables.items import items_folder, read_raw

FIDELITY_METRICS = ("kl", "top1_agreement", "hidden_mse", "commit_flips")


def publish(source: Path, target: Path, steps: bool = False) -> int:
    """Copy every record below `source` into `target`; returns how many.

    Raises:
        RecordError: no record, a damaged one, or a name that `target` has already.
    """
    paths = sorted(source.rglob("*.json"))
    if not paths:
        raise RecordError(f"{source}: holds no record")
    names: set[str] = set()
    for path in paths:
        record = read_record(path)
        if (target / path.name).exists() or path.name in names:
            raise RecordError(f"{target / path.name}: is there already; give a new folder")
        if record.scores and not items_folder(path).is_dir():
            raise RecordError(f"{items_folder(path)}: the record's items are missing")
        names.add(path.name)
    for path in paths:
        for file in sorted(items_folder(path).glob("*.jsonl")):
            rows = read_raw(path, file.stem)
            kept = _fidelity(rows, steps) if file.stem == "fidelity" else map(_item, rows)
            out = items_folder(target / path.name) / file.name
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / path.name)  # last: a record stands for finished items
    return len(paths)


def _item(row: dict[str, Any]) -> dict[str, Any]:
    names = row.get("metrics", ())
    kept = {"doc_id": row["doc_id"], "doc_hash": str(row.get("doc_hash", ""))[:12], "filter": row.get("filter", "none")}
    return kept | {name: _short(row[name]) for name in names if isinstance(row.get(name), int | float)}


def _fidelity(rows: list[dict[str, Any]], steps: bool) -> Iterator[dict[str, Any]]:
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    for prompt, own in by_prompt.items():
        same = {"prompt": prompt, "doc_hash": own[0].get("doc_hash", "")[:12]}
        stepped = [row for row in own if row.get("step") is not None]
        if steps:
            for row in stepped:
                yield same | {"step": row["step"]} | {m: _short(row[m]) for m in FIDELITY_METRICS if m in row}
            continue
        values = {m: [row[m] for row in stepped if m in row] for m in FIDELITY_METRICS}
        yield same | {m: _short(sum(v) / len(v)) for m, v in values.items() if v}


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python -m starquant.tables.publish", description=__doc__)
    parser.add_argument("source", type=Path, help="folder of records with their items beside them")
    parser.add_argument("target", type=Path, help="folder to copy them to")
    parser.add_argument("--steps", action="store_true", help="keep fidelity at every denoising step")
    given = parser.parse_args(arguments)
    try:
        if not given.source.is_dir():
            raise ConfigError(f"{given.source}: no such folder of records")
        print(f"{publish(given.source, given.target, given.steps)} records in {given.target}")
    except (StarquantError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
