"""The table a run ends with: each task, full precision, quantized, difference, standard error; then fidelity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from starquant.config.bits import in_words
from starquant.config.speed import SpeedSpec
from starquant.reports.durations import took
from starquant.store.items import is_fidelity
from starquant.store.record import RunRecord, Score

HEADER = ("task", "metric", "n", "full precision", "quantized", "difference", "stderr")


def rows(record: RunRecord, baseline: RunRecord | None) -> list[tuple[str, ...]]:
    """Return the table's cells as text; subjects of groups and mask-ratio bins are left to the record.

    Fractions are in percent. Fidelity is measured against full precision, so that its column there is empty; so is the
    whole column of a packed checkpoint, which has no baseline, and all of a task that was left out.
    """
    scores = () if baseline is None else baseline.scores
    references = {(s.task, s.metric, s.filter): s for s in scores if not is_fidelity(s.task)}
    tasks = record.spec["tasks"]
    scored = [score for name in tasks["names"] for score in record.scores if score.task == name]
    fidelity = [score for score in record.scores if is_fidelity(score.task) and score.filter == "all"]
    lines = [[_row(s, references.get((s.task, s.metric, s.filter))) for s in part] for part in (scored, fidelity)]
    return [*lines[0], *((name, "left out", *[""] * 5) for name in tasks.get("left_out") or ()), *lines[1]]


def _row(score: Score, reference: Score | None) -> tuple[str, ...]:
    return (
        score.task,
        _metric(score),
        str(score.n),
        "" if reference is None else _number(reference.value, reference.unit),
        _number(score.value, score.unit),
        "" if reference is None or score.unit != "fraction" else f"{100 * (score.value - reference.value):+.2f}",
        "" if score.stderr is None else _number(score.stderr, score.unit),
    )


def _metric(score: Score) -> str:
    if not is_fidelity(score.task):
        return score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
    return score.metric if score.unit == "fraction" else f"{score.metric} ({score.unit})"


def _number(value: float, unit: str) -> str:
    return f"{100 * value:.2f}" if unit == "fraction" else f"{value:.4g}"


def aligned(rows: Sequence[Sequence[str]], ruled: bool = False, left: int = 2) -> list[str]:
    """Return rows of cells as lines of columns, the first ones flush left and the others right.

    Args:
        rows: the header first.
        ruled: whether a line of dashes stands below the header.
        left: how many columns are flush left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *lines = (
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return [header, *(["  ".join("-" * w for w in widths)] if ruled else []), *lines]


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
