"""Records as a pandas DataFrame: one row a score."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from starquant.errors import RecordError
from starquant.reports.choice import Where, taken
from starquant.reports.run import Run
from starquant.reports.selection import validate_speed
from starquant.store.records import read_record
from starquant.store.source import record_paths
from starquant.store.verification import validate_items

COLUMNS = (
    *("model", "bits", "method", "seed", "limit", "digest", "git_sha", "git_dirty", "device", "record"),
    *("task", "requested", "metric", "filter", "value", "stderr", "ci_low", "ci_high", "unit", "n"),
    *("task_version", "num_fewshot"),
)


def scores_frame(folder: Path, where: Where | None = None) -> pd.DataFrame:
    """Return every score of every record below `folder`, in the order of the file names.

    Args:
        folder: of records.
        where: dotted configuration keys and values that records must have; without `tasks.limit` among them those of
            some items only are left out. None takes every record.

    Raises:
        ConfigError: a value that no record has.
        RecordError: a record is not what was written, or not the means of its items; approximate evaluations among
            exact ones; the message names them.
    """
    rows, specs = [], {}
    runs = [Run(path, read_record(path)) for path in record_paths(folder)]
    for run in runs:
        validate_items(run.path, run.record)
    for run in runs if where is None else taken(folder, runs, where):
        path, record = run.path, run.record
        specs[path] = record.spec
        spec, source = record.spec, record.provenance
        common = {
            "model": spec["model"]["name"],
            "bits": spec["bits"]["name"],
            "method": spec["method"]["name"],
            "seed": spec["seed"],
            "limit": spec["tasks"]["limit"],
            "digest": record.digest,
            "git_sha": source.get("git_sha"),
            "git_dirty": source.get("git_dirty"),
            "device": source.get("device_name"),
            "record": path.name,
        }
        names = spec["tasks"]["names"]
        rows += [
            common | score.model_dump(exclude={"higher_is_better"}) | {"requested": score.task in names}
            for score in record.scores
        ]
    validate_speed(specs)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def pivot(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a (model, bits, method, seed) and one column a (task, metric, filter); fractions in percent.

    Scores of some items only are left out where there are others.

    Raises:
        RecordError: several records of one row, which only other settings tell apart (`across_seeds` compares seeds).
    """
    row = ["model", "bits", "method", "seed"]
    frame = frame[frame["limit"].isna()] if frame["limit"].isna().any() else frame
    frame = frame.drop_duplicates(["digest", "task", "metric", "filter", "value"])  # copies of a record
    repeated = frame[frame.duplicated([*row, "task", "metric", "filter"])]
    if len(repeated):
        name = ", ".join(map(str, repeated[row].iloc[0]))
        files = ", ".join(dict.fromkeys(repeated["record"]))
        raise RecordError(f"{name}: several records share this row ({files} and others); see reports.across_seeds")
    scale = frame["unit"].map({"fraction": 100.0}).fillna(1.0)
    table = frame.assign(value=scale * frame["value"]).pivot_table(
        index=row, columns=["task", "metric", "filter"], values="value", sort=False
    )
    return table.round(4)
