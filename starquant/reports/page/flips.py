"""Which answers flipped: item by item, full precision beside a quantized row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starquant.errors import RecordError
from starquant.reports.page.rows import PageRow
from starquant.reports.run import Run
from starquant.store.columns import FILE as COLUMNS
from starquant.store.items import is_fidelity, items_folder, read_raw
from starquant.store.source import items_files

#: Items of a row and task that are shown at most, and characters of an answer.
MOST_ITEMS, LONGEST = 200, 600
Line = Mapping[str, Any]


def flips(rows: Sequence[PageRow]) -> list[dict[str, Any]]:
    """Return a part for each quantized row and task that full precision was scored on as well.

    Each has `row` (its index), `task`, `record` and `reference` (the two runs, of one model seed), `n` items, counts
    `lost`, `won`, `other` (another answer, the same score), and `items`: those that differ, the flipped ones first.
    """
    parts = []
    for index, row in enumerate(rows):
        full = [run for other in rows if other.is_full_precision and other.model == row.model for run in other.runs]
        pairs = ((run, twin) for run in row.runs for twin in full if _goes_with(run, twin))
        pair = None if row.is_full_precision else next(pairs, None)
        if pair is not None:
            parts += [{"row": index, **part} for task in _tasks(*pair) if (part := _of_task(*pair, task)) is not None]
    return parts


def _goes_with(run: Run, full: Run) -> bool:
    return all(run.get(key) == full.get(key) for key in ("model.seed", "seed", "tasks.limit"))


def _tasks(run: Run, full: Run) -> list[str]:
    ours, theirs = ({*(items_files(items_folder(one.path)) or ())} - {COLUMNS} for one in (run, full))
    return sorted(task for name in ours & theirs if not is_fidelity(task := name.removesuffix(".jsonl")))


def _of_task(run: Run, full: Run, task: str) -> dict[str, Any] | None:
    try:
        sides = [_by_item(read_raw(one.path, task)) for one in (full, run)]
    except RecordError:
        return None
    common = [key for key in sides[0] if key in sides[1]]
    items = [item for key in common if (item := _item(*(side[key] for side in sides))) is not None]
    items.sort(key=lambda item: KINDS.index(item["kind"]))
    if not common:
        return None
    return {
        "task": task,
        "record": run.path.stem,
        "reference": full.path.stem,
        "n": len(common),
        **{kind: sum(item["kind"] == kind for item in items) for kind in KINDS},
        "items": items[:MOST_ITEMS],
    }


KINDS = ("lost", "won", "other")


def _by_item(lines: Sequence[Line]) -> dict[tuple[Any, str, str], Line]:
    """Return lines by what makes two of them the same item: number, document, filter."""
    return {
        (line.get("doc_id"), str(line.get("doc_hash", ""))[:12], str(line.get("filter", "none"))): line
        for line in lines
    }


def _item(full: Line, quantized: Line) -> dict[str, Any] | None:
    """Return an item on which two runs differ, None where score and answer are the same."""
    before, after = score_of(full), score_of(quantized)
    answers = answer_of(full), answer_of(quantized)
    if before is None or after is None or (before == after and answers[0][0] == answers[1][0]):
        return None
    return {
        "item": full.get("doc_id"),
        "filter": str(full.get("filter", "none")),
        "question": _shown(full.get("question")),
        "target": _shown(full.get("target")),
        "full": answers[0][1],
        "quantized": answers[1][1],
        "scores": [before, after],
        "kind": "other" if before == after else ("lost" if after < before else "won"),
    }


def score_of(line: Line) -> float | None:
    """Return the first metric of an item's line, as a number."""
    names = line.get("metrics") or [name for name in line if name not in ("doc_id", "doc_hash", "filter", "target")]
    numbers = [line[name] for name in names if isinstance(line.get(name), int | float)]
    return float(numbers[0]) if numbers else None


def answer_of(line: Line) -> tuple[str, str]:
    """Return what tells two answers apart, and the answer as it is shown; both empty where it was not kept.

    Of choices it is the most likely one, whose log-likelihood is shown beside it.
    """
    chosen, written = line.get("filtered_resps"), line.get("resps")
    if _are_likelihoods(chosen):
        assert isinstance(chosen, list)
        best = max(range(len(chosen)), key=lambda choice: float(chosen[choice][0]))
        return f"choice {best}", f"choice {best} ({float(chosen[best][0]):.3f} nats)"
    text = written
    while isinstance(text, list) and text:
        text = text[0]
    return (_shown(text),) * 2


def _are_likelihoods(responses: Any) -> bool:
    return (
        isinstance(responses, list)
        and bool(responses)
        and all(isinstance(one, list) and one and isinstance(one[0], int | float) for one in responses)
    )


def _shown(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
