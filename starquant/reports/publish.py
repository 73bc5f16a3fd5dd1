"""Records in the compact form, small enough to be committed; what reads records reads it directly.

    starquant publish results/records results/published/NAME                  all of every record and its items
    starquant publish results/records results/published/NAME --items numbers  no texts: as much as tables read
    starquant publish results/published/NAME OUT --plain                      back into folders, as runs write them

Records keep their seals, and come back byte for byte; one whose items were left out in part is sealed again over those
that are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from starquant.errors import CommandParser, ConfigError, RecordError, one_line_errors, user_path
from starquant.store.columns import FILE, columns_text
from starquant.store.compacting import RecordFiles, plain_text, write_compact
from starquant.store.files import write_atomically
from starquant.store.items import FIDELITY, items_folder, read_columns, read_raw
from starquant.store.records import read_record
from starquant.store.source import is_compact, read_file, read_items_files, record_paths
from starquant.store.verification import sealed, validate_items

FIDELITY_METRICS = ("kl", "top1_agreement", "hidden_mse", "commit_flips")
#: How much of items is kept.
ITEMS = {
    "all": "as they are",
    "steps": "numbers, and fidelity at every denoising step (for figures along the trajectory)",
    "numbers": "numbers with what pairs them, no texts; fidelity averaged over each prompt's steps",
}


def publish(source: Path, target: Path, items: str = "all", plain: bool = False) -> int:
    """Copy every record below `source` into `target`, of copies of a record one; returns how many.

    Args:
        source: folder of records, in either form.
        target: folder that holds no record.
        items: one of `ITEMS`.
        plain: write folders and files as runs do, not the compact form.

    Raises:
        RecordError: no record, a damaged one, records in `target`, or two records of one name.
        OSError: a file cannot be written.
    """
    if target.exists() and not target.is_dir():
        raise RecordError(f"{target}: is a file; give a new folder")
    if next(iter(record_paths(target)), None) is not None:
        raise RecordError(f"{target}: holds records already; give a new folder")
    path_by_name: dict[str, Path] = {}
    for path in record_paths(source):
        record, first = read_record(path), path_by_name.setdefault(path.stem, path)
        if first != path and read_record(first).scores != record.scores:
            raise RecordError(f"{first} and {path}: two records of one experiment, with other scores; keep one of them")
        if record.scores and not validate_items(path, record, whole=True) and record.seal is not None:
            raise RecordError(f"{items_folder(path)}: the record's items are missing")
    if not path_by_name:
        raise RecordError(f"{source}: holds no record")
    records = [_files(path) if items == "all" else _slim(path, items == "steps") for path in path_by_name.values()]
    if plain:
        for one in records:
            _write_plain(target, one)
    else:
        write_compact(target, records)
    return len(records)


def _files(path: Path) -> RecordFiles:
    """Return a record with all of its items."""
    files = read_items_files(items_folder(path))
    return RecordFiles(path.stem, _text(path), {name: content.decode() for name, content in files.items()})


def _text(path: Path) -> str:
    """Return the file of a record; the compact form keeps what it says, without the layout."""
    text = read_file(path).decode()
    return plain_text(json.loads(text)) if is_compact(path) else text


def _slim(path: Path, steps: bool) -> RecordFiles:
    """Return a record with the numbers of its items; the seal of one that has any is put over these."""
    items: dict[str, str] = {}
    if read_items_files(items_folder(path)):
        columns = read_columns(items_folder(path))
        if steps and FIDELITY in columns:
            rows = _steps(read_raw(path, FIDELITY))
            items[f"{FIDELITY}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
        items[FILE] = columns_text({task: numbers.model_dump() for task, numbers in columns.items()})
    data = json.loads(read_file(path))
    if data.get("seal") is None:
        return RecordFiles(path.stem, _text(path), items)
    data = sealed(data, {name: text.encode() for name, text in items.items()})
    return RecordFiles(path.stem, plain_text(data), items)


def _steps(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row.get("step") is not None:
            same = {"prompt": row["prompt"], "doc_hash": row.get("doc_hash", "")[:12], "step": row["step"]}
            yield same | {m: float(f"{row[m]:.6g}") for m in FIDELITY_METRICS if m in row}


def _write_plain(target: Path, one: RecordFiles) -> None:
    path = target / f"{one.name}.json"
    for name, text in one.items.items():
        write_atomically(items_folder(path) / name, text)
    write_atomically(path, one.record)  # last: a record stands for finished items


@one_line_errors(OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 2 after bad input."""
    parser = CommandParser(
        prog="starquant publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=user_path, help="folder of records, in either form")
    parser.add_argument("target", type=user_path, help="folder to write them to")
    kept = "; ".join(f"{name}: {what}" for name, what in ITEMS.items())
    parser.add_argument("--items", choices=[*ITEMS], default="all", help=f"{kept} (default: all)")
    parser.add_argument("--plain", action="store_true", help="write folders and files as runs do")
    options = parser.parse_args(arguments)
    if not options.source.is_dir():
        raise ConfigError(f"{options.source}: no such folder of records")
    count = publish(options.source, options.target, options.items, options.plain)
    files = [path for path in options.target.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{count} records in {options.target} ({len(files)} files, {size:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
