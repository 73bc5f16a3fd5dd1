"""Copy records with no more of their items than tables need: small enough to be committed.

    python -m starquant.reports.publish results/records results/published/NAME

Records are copied as they are, with a seal over what is left of their items: numbers with what pairs them
(`columns.json`), no texts. Fidelity is averaged over each prompt's steps; `--steps` keeps these too (for figures along
the trajectory).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from starquant.errors import ConfigError, RecordError, one_line_errors, user_path
from starquant.store.columns import keep_columns, read_columns
from starquant.store.files import write_atomically
from starquant.store.items import FIDELITY, items_folder, read_raw
from starquant.store.records import read_record, record_paths
from starquant.store.verification import sealed, validate_items

FIDELITY_METRICS = ("kl", "top1_agreement", "hidden_mse", "commit_flips")


def publish(source: Path, target: Path, steps: bool = False) -> int:
    """Copy every record below `source` into `target`, of copies of a record one; returns how many.

    Raises:
        RecordError: no record, a damaged one, a name that `target` has already, or two records of one name.
    """
    path_by_name: dict[str, Path] = {}
    for path in record_paths(source):
        record, first = read_record(path), path_by_name.setdefault(path.name, path)
        if (target / path.name).exists():
            raise RecordError(f"{target / path.name}: is there already; give a new folder")
        if read_record(first).scores != record.scores:
            raise RecordError(f"{first} and {path}: two records of one experiment, with other scores; keep one of them")
        if record.scores and not items_folder(path).is_dir():
            raise RecordError(f"{items_folder(path)}: the record's items are missing")
        validate_items(path, record, whole=True)
    if not path_by_name:
        raise RecordError(f"{source}: holds no record")
    for path in path_by_name.values():
        out = items_folder(target / path.name)
        out.mkdir(parents=True, exist_ok=True)
        columns = read_columns(items_folder(path)) if items_folder(path).is_dir() else {}
        tasks = {task: numbers.model_dump() for task, numbers in columns.items()}
        keep_columns(out, tasks)
        if steps and FIDELITY in tasks:
            rows = "".join(json.dumps(row) + "\n" for row in _steps(read_raw(path, FIDELITY)))
            (out / f"{FIDELITY}.jsonl").write_text(rows, encoding="utf-8")
        _copy_record(path, target / path.name)  # last: a record stands for finished items
    return len(path_by_name)


def _copy_record(source: Path, target: Path) -> None:
    """Copy a record; the seal of one that has any is put over the items beside its copy."""
    data = json.loads(source.read_text(encoding="utf-8"))
    if data.get("seal") is None:
        shutil.copyfile(source, target)
    else:
        write_atomically(target, json.dumps(sealed(data, items_folder(target)), indent=1) + "\n")


def _steps(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row.get("step") is not None:
            same = {"prompt": row["prompt"], "doc_hash": row.get("doc_hash", "")[:12], "step": row["step"]}
            yield same | {m: float(f"{row[m]:.6g}") for m in FIDELITY_METRICS if m in row}


@one_line_errors(OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python -m starquant.reports.publish", description=__doc__)
    parser.add_argument("source", type=user_path, help="folder of records with their items beside them")
    parser.add_argument("target", type=user_path, help="folder to copy them to")
    parser.add_argument("--steps", action="store_true", help="keep fidelity at every denoising step")
    options = parser.parse_args(arguments)
    if not options.source.is_dir():
        raise ConfigError(f"{options.source}: no such folder of records")
    print(f"{publish(options.source, options.target, options.steps)} records in {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
