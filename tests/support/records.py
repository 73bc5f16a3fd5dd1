"""Records and items with made-up numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from starquant.config.run import RunSpec
from starquant.store.manifest import ManifestEntry
from starquant.store.provenance import collect, running_code
from starquant.store.record import RunRecord, Score, Timings
from starquant.store.records import RecordStore
from starquant.store.source import read_items_files
from starquant.store.verification import sealed
from tests.support.specs import spec

#: Taken once, as a session does.
CODE = running_code()


def make_record(run: RunSpec, value: float = 0.5) -> RunRecord:
    score = Score(
        task="testbed_facts",
        metric="acc",
        filter="none",
        value=value,
        stderr=0.01,
        n=8,
        higher_is_better=True,
        task_version="1.0",
        num_fewshot=0,
    )
    return RunRecord(
        digest=run.digest(),
        spec=run.model_dump(mode="json"),
        status="complete",
        scores=[score],
        manifest=[ManifestEntry(name="x", kind="linear", role="q_proj", weight_bits=4)],
        timings=Timings(seconds={"evaluate": 1.0}, peak_host_memory_gb=0.5, peak_device_memory_gb=None),
        provenance=collect("cpu", "cpu", CODE),
    )


Items = dict[str, list[dict[str, Any]]]


def write_record(folder: Path, items: Items, *overrides: str, scores: Sequence[Score] = ()) -> Path:
    """Write the record of a specification with these items, and with more scores."""
    run = spec(*overrides)
    record = make_record(run)
    record = record.model_copy(update={"scores": [*record.scores, *scores]})
    return RecordStore(folder).write(run, of_items(record, items), items)


def of_items(record: RunRecord, items: Items) -> RunRecord:
    """The record with the scores that these items have; others stay as they are."""
    return record.model_copy(update={"scores": [_of_rows(score, items.get(score.task, [])) for score in record.scores]})


def _of_rows(score: Score, rows: Sequence[Mapping[str, Any]]) -> Score:
    by_item: dict[Any, list[float]] = {}
    for row in rows:
        if score.metric in row:
            by_item.setdefault(row.get("doc_id", row.get("prompt")), []).append(row[score.metric])
    value = fmean(map(fmean, by_item.values())) if by_item else math.nan
    if not math.isfinite(value):
        return score
    return score.model_copy(update={"value": value, "stderr": None, "n": len(by_item)})


def edit_record(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change a record as if it had been written so."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(sealed(data, read_items_files(path.with_suffix(".items")))), encoding="utf-8")
    return path


def write(folder: Path, bits: str, items: Items, scores: Sequence[Score] = ()) -> Path:
    """Write a record of round to nearest at these bits."""
    return write_record(folder, items, f"bits={bits}", scores=scores)


def items_of(values: list[float], **more: Any) -> list[dict[str, Any]]:
    return [
        {"doc_id": i, "target": 3, "resps": [["x\u2028y"]], "filter": "none", "metrics": ["acc"], "doc_hash": f"h{i}"}
        | {"acc": value}
        | more
        for i, value in enumerate(values)
    ]


def fidelity_rows(values: list[list[float]]) -> list[dict[str, Any]]:
    """One row a step and, last, the answer's."""
    found = []
    for prompt, steps in enumerate(values):
        same = {"prompt": prompt, "doc_hash": f"p{prompt}"}
        found += [same | {"step": s, "mask_ratio": 1.0 - s / 9, "kl": kl} for s, kl in enumerate(steps)]
        found.append(same | {"step": None, "mask_ratio": None, "same_answer": 1.0})
    return found
