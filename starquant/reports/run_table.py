"""The table a run ends with: each task, full precision, quantized, difference, standard error; then fidelity."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import Any

from starquant.config.bits import in_words
from starquant.config.speed import SpeedSpec
from starquant.reports.durations import took
from starquant.reports.frame import beside
from starquant.reports.text import aligned
from starquant.store.items import is_fidelity
from starquant.store.record import RunRecord

HEADER = ("task", "metric", "n", "full precision", "quantized", "difference", "stderr")


def rows(record: RunRecord, baseline: RunRecord | None) -> list[tuple[str, ...]]:
    """Return the table's cells as text; subjects of groups and mask-ratio bins are left to the record.

    Fractions are in percent. Fidelity is measured against full precision, so that its column there is empty; so is the
    whole column of a packed checkpoint, which has no baseline, and all of a task that was left out.
    """
    frame, tasks = beside(record, baseline), record.spec["tasks"]
    scored = [row for name in tasks["names"] for row in frame[frame["task"] == name].itertuples()]
    fidelity = [row for row in frame[frame["filter"] == "all"].itertuples() if is_fidelity(str(row.task))]
    left_out = ((name, "left out", *[""] * 5) for name in tasks.get("left_out") or ())
    return [*map(_row, scored), *left_out, *map(_row, fidelity)]


def _row(score: Any) -> tuple[str, ...]:
    return (
        score.task,
        _metric(score),
        str(score.n),
        _number(score.full, score.unit),
        _number(score.value, score.unit),
        "" if isnan(score.difference) else f"{100 * score.difference:+.2f}",
        _number(score.stderr, score.unit),
    )


def _metric(score: Any) -> str:
    if not is_fidelity(score.task):
        return score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
    return score.metric if score.unit == "fraction" else f"{score.metric} ({score.unit})"


def _number(value: float | None, unit: str) -> str:
    if value is None or isnan(value):
        return ""
    return f"{100 * value:.2f}" if unit == "fraction" else f"{value:.4g}"


def render(record: RunRecord, baseline: RunRecord | None, path: Path, export_s: float | None = None) -> str:
    """Return the report as text: what was run, the table, what took how long, and where the record lies.

    Args:
        record: of the run.
        baseline: of its full-precision twin, where it has one.
        path: of the record.
        export_s: seconds that the export took; None where there was none.
    """
    spec = record.spec
    title = f"{spec['model']['name']}  {in_words(spec['bits'])}  {spec['method']['name']}  seed {spec['seed']}"
    cells = [HEADER, *rows(record, baseline)]
    speed = SpeedSpec.model_validate(spec.get("speed", {}))
    if speed.approximations:
        title += f"\napproximate evaluation: {', '.join(speed.approximations)}"
    twin = None if baseline is None or baseline.digest == record.digest else baseline.timings.total_s
    footer = f"took {took(record.timings, {'export': export_s, 'full precision': twin})}"
    memory = f"peak memory {record.timings.peak_host_memory_gb:.2f} GB; record: {path}"
    return "\n".join(["", title, *aligned(cells, ruled=True), footer, memory])
