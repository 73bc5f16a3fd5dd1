"""Where every row comes from: record by record, code, machine, time, what it was calibrated on; and what each lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starquant.errors import RecordError
from starquant.reports.page.rows import PageRow
from starquant.reports.page.table import rounded
from starquant.reports.seeds import seeds_of
from starquant.store.record import RunRecord
from starquant.store.records import read_record

#: Columns of the listing.
HEADER = (
    *("row", "record", "seeds", "tasks", "items", "calibration", "code", "packages", "device", "finished", "seconds"),
    "seal",
)


def provenance(rows: Sequence[PageRow]) -> list[list[str]]:
    """Return the cells of every run of every row, below `HEADER`."""
    return [_line(row, run.record.spec, _whole(run.path, run.record.digest), run) for row in rows for run in row.runs]


def _whole(path: Any, digest: str) -> RunRecord | None:
    try:
        return read_record(path)
    except RecordError:  # its head was read: of tables alone
        return None


def _line(row: PageRow, spec: dict[str, Any], record: RunRecord | None, run: Any) -> list[str]:
    source = run.record.provenance
    dirty = {True: " and changes", None: ", unknown whether changed"}.get(source.get("git_dirty"), "")
    seeds = dict(zip(("model", "method", "run"), seeds_of(run), strict=True))
    packages = source.get("packages") or {}
    limit = run.get("tasks.limit")
    calibration = None if record is None else record.calibration
    return [
        row.name,
        run.path.stem,
        ", ".join(f"{name} {seed}" for name, seed in seeds.items() if seed is not None),
        ", ".join(run.get("tasks.names") or ()) or "fidelity only",
        "all" if limit is None else f"first {limit} of each",
        _calibration(spec, calibration),
        f"{str(source.get('git_sha') or 'no commit')[:12]}{dirty}; {source.get('code_digest')}",
        ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "lm-eval") if packages.get(name)),
        str(source.get("device_name")),
        str(source.get("finished_at")),
        "" if record is None else f"{record.timings.total_s:.0f}",
        "sealed" if run.record.seal is not None else "none: cannot be verified",
    ]


def _calibration(spec: dict[str, Any], report: dict[str, Any] | None) -> str:
    if report is None:
        return "-"
    overlap = report.get("overlapping_tasks") or []
    words = [f"{report.get('source', spec['calibration'].get('name'))}", f"{report.get('states', '?')} states"]
    return ", ".join([*words, *([f"same data set as {', '.join(overlap)}"] if overlap else [])])


def sqnr(rows: Sequence[PageRow]) -> list[dict[str, Any]]:
    """Return the SQNR of what each row's first run quantized: weights by role, activations by site, in dB."""
    points = []
    for row in rows:
        record = None if row.is_full_precision else _whole(row.runs[0].path, row.runs[0].record.digest)
        cells: dict[tuple[str, str, int], float] = {}
        for entry in () if record is None else record.manifest:
            if entry.block is None:
                continue
            if entry.weight_sqnr_db is not None:
                cells[f"weights: {entry.role}", "w", entry.block] = entry.weight_sqnr_db
            if entry.activation_sqnr_db is not None:
                site = (entry.site or "").rpartition(".")[2] or f"attention {entry.role}"
                cells[f"activations: {site}", "a", entry.block] = entry.activation_sqnr_db
        points += [
            {"row": row.name, "what": what, "block": block, "db": rounded(round(db, 2))}
            for (what, _, block), db in cells.items()
        ]
    return points
