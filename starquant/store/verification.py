"""Whether a record is what was written: its content, its numbers, its items, and scores that are means of these."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from starquant.errors import RecordError
from starquant.store.columns import FILE, TaskColumns, columns_text
from starquant.store.files import FileEntry, set_aside, write_atomically
from starquant.store.items import is_fidelity, items_folder, read_columns, rows_columns
from starquant.store.record import FIRST_SEALED, RecordHead, RunRecord, Score, Seal
from starquant.store.source import is_compact, items_files, read_file

#: Metrics of tasks that are means over items; of fidelity, all of them are.
MEANS = ("acc", "acc_norm", "exact_match", "pass@1", "solved")
#: Items keep nine digits of a number.
_TOLERANCE = 1e-6


def sealed(data: dict[str, Any], items: Mapping[str, bytes] | None = None) -> dict[str, Any]:
    """Return a record or report, as plain data, with a seal over it and its items files, by name.

    Raises:
        ValueError: numbers that are not finite.
    """
    entries = {name: FileEntry.of_bytes(content) for name, content in (items or {}).items()}
    data = data | {"seal": Seal(items=entries).model_dump()}
    data["seal"]["content"] = _digest(data)
    return data


def is_intact(data: dict[str, Any]) -> bool:
    """Return whether plain data is what its seal was put on; raises ValueError for numbers that are not finite."""
    seal = data.get("seal")
    return isinstance(seal, dict) and _digest(data) == seal.get("content")


def validate_content(path: Path, record: RecordHead, text: bytes) -> None:
    """Judge a record by itself.

    Raises:
        RecordError: it is not what was written, numbers that are not finite, a negative error, no items.
    """
    wrong = next(_wrong_numbers(record), None)
    if wrong is not None:
        raise RecordError(f"{path}: {wrong}")
    if record.schema_version < FIRST_SEALED:
        return
    try:
        intact = is_intact(json.loads(text))
    except (ValueError, RecursionError) as error:  # numbers that are not finite among them
        raise RecordError(f"{path}: not what was written ({error})") from None
    if not intact:
        raise RecordError(f"{path}: not what was written: its content is not that of its seal")


def _digest(data: dict[str, Any]) -> str:
    unsealed = data | {"seal": data["seal"] | {"content": ""}}
    text = json.dumps(unsealed, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _wrong_numbers(record: RecordHead) -> Iterator[str]:
    """Yield what no run can have written, with its place."""
    for part in ("model", "bits", "method", "tasks"):
        named = record.spec.get(part)
        if not isinstance(named, dict) or not isinstance(named.get("name"), str):
            yield f"spec.{part}.name: is missing"
    for name in ("names", "limit"):
        if name not in (record.spec.get("tasks") or {}):
            yield f"spec.tasks.{name}: is missing"
    for index, score in enumerate(record.scores):
        place = f"scores.{index}"
        for name in ("value", "stderr", "ci_low", "ci_high"):
            number = getattr(score, name)
            if number is not None and not math.isfinite(number):
                yield f"{place}.{name}: got {number} ({score.task} {score.metric}), allowed: a finite number"
        if score.stderr is not None and score.stderr < 0:
            yield f"{place}.stderr: got {score.stderr} ({score.task} {score.metric}), allowed: 0 or more"
        if score.n < 1:
            yield f"{place}.n: got {score.n} ({score.task} {score.metric}), allowed: 1 or more"
        if score.ci_low is not None and score.ci_high is not None and score.ci_low > score.ci_high:
            yield f"{place}.ci_low: got {score.ci_low} ({score.task} {score.metric}), allowed: at most ci_high"
    if isinstance(record, RunRecord):
        for stage, seconds in record.timings.seconds.items():
            if not 0 <= seconds < math.inf:
                yield f"timings.seconds.{stage}: got {seconds}, allowed: 0 or more"


def validate_items(path: Path, record: RecordHead, whole: bool = False) -> dict[str, TaskColumns]:
    """Compare a record with its items, and return the numbers of these, none where there are no items.

    Of a record without a seal items may be missing; those that are there are compared with its scores.

    Args:
        path: of the record, beside its items.
        record: as it was read.
        whole: read all files; else those are judged by their size that tables do not read.

    Raises:
        RecordError: items that are missing, damaged or not those that were written, a score that is not their mean.
    """
    folder = items_folder(path)
    if record.seal is not None:
        _validate_files(folder, record.seal, whole)
    if not items_files(folder):
        return {}
    columns = read_columns(folder)
    for index, score in enumerate(record.scores):
        wrong = _wrong_mean(score, columns)
        if wrong is not None:
            raise RecordError(f"{path}: scores.{index} ({score.task} {score.metric}): {wrong}")
    return columns


def _validate_files(folder: Path, seal: Seal, whole: bool) -> None:
    names = items_files(folder)
    if seal.items and names is None:
        raise RecordError(f"{folder}: the items of the record are missing")
    for extra in (name for name in names or () if name not in seal.items):
        raise RecordError(f"{folder / extra}: is not of the record's items")
    again = FILE not in (names or ()) and len(seal.items) > 1  # numbers are made again of the items
    for name, entry in seal.items.items():
        if name == FILE and again:
            continue
        try:
            if is_compact(folder):
                entry.validate_content(folder / name, read_file(folder / name))
            else:
                entry.validate_file(folder / name, whole or again or name == FILE)
        except FileNotFoundError:
            raise RecordError(f"{folder / name}: is missing") from None
        except RecordError as error:
            way = "; delete it, it is made again of the items beside it" if name == FILE and len(seal.items) > 1 else ""
            raise RecordError(f"{error}{way}") from None


def mend_columns(path: Path, record: RecordHead) -> None:
    """Make the numbers of a record's items again where they are not what was written and the items are.

    The file is set aside. Where the seal is of another order of tasks than can be told, none takes its place: readers
    take the numbers of the items.

    Raises:
        RecordError: items that are missing or damaged as well, numbers that cannot be written.
    """
    folder, entries = items_folder(path), {} if record.seal is None else dict(record.seal.items)
    kept = entries.pop(FILE, None)
    if kept is None or not entries or is_compact(folder) or FILE not in (items_files(folder) or ()):
        return
    try:
        kept.validate_file(folder / FILE)
        return
    except RecordError as error:
        why = str(error)
    for name, entry in entries.items():
        entry.validate_file(folder / name)
    tasks = {name: numbers.model_dump() for name, numbers in rows_columns(folder).items()}
    by_score = {score.task: tasks[score.task] for score in record.scores if score.task in tasks}
    texts = [columns_text(order) for order in (by_score | tasks, tasks)]
    set_aside(folder / FILE, why)
    try:
        for text in texts:
            if FileEntry.of_bytes(text.encode()) == kept:
                write_atomically(folder / FILE, text)
                return
    except OSError as error:
        raise RecordError(f"{folder / FILE}: cannot be written: {error}") from None


def _wrong_mean(score: Score, columns: dict[str, TaskColumns]) -> str | None:
    """Return how a score differs from its items; None where it does not, or is none of their means."""
    fidelity = is_fidelity(score.task)
    key = f"{score.metric},{'none' if fidelity and score.filter == 'all' else score.filter}"
    leaves = [score.task] if score.task in columns else [name for name in columns if name.startswith(f"{score.task}_")]
    values = [value for leaf in leaves for value in columns[leaf].values.get(key, ())]
    if not values or len(values) < sum(columns[leaf].n for leaf in leaves) or not (fidelity or score.metric in MEANS):
        return None
    if len(values) != score.n:
        return f"n is {score.n}, its items are {len(values)}"
    mean = math.fsum(values) / len(values)
    if not math.isclose(score.value, mean, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
        return f"value is {score.value}, the mean of its items {mean:.9g}"
    if fidelity or leaves != [score.task] or score.stderr is None or len(values) < 2:  # bootstrapped, pooled, none
        return None
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    if not math.isclose(score.stderr, spread, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
        return f"stderr is {score.stderr}, that of its items {spread:.9g}"
    return None
