"""Records as pandas DataFrames: a row a score, a row a denoising step; what tables, pages and figures are views of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from starquant.errors import RecordError
from starquant.reports.choice import Where, taken
from starquant.reports.run import Run
from starquant.reports.selection import read_runs, validate_speed
from starquant.store.items import FIDELITY, is_fidelity, read_raw
from starquant.store.record import RecordHead

COLUMNS = (
    *("model", "bits", "method", "seed", "limit", "digest", "git_sha", "git_dirty", "device", "record"),
    *("task", "requested", "metric", "filter", "value", "stderr", "ci_low", "ci_high", "unit", "n"),
    *("task_version", "num_fewshot"),
)
#: Metrics of fidelity that items have at every denoising step.
AT_STEPS = ("kl", "top1_agreement", "hidden_mse", "commit_flips")


def scores_frame(records: Path | Sequence[Run], where: Where | None = None) -> pd.DataFrame:
    """Return every score of every record, in the order of the file names.

    Args:
        records: a folder of them, or runs that were read of one.
        where: dotted configuration keys and values that records must have; without `tasks.limit` among them those of
            some items only are left out. None takes every record.

    Raises:
        ConfigError: a value that no record has.
        RecordError: a record is not what was written, or not the means of its items; approximate evaluations among
            exact ones; the message names them.
    """
    runs = read_runs(records) if isinstance(records, Path) else records
    runs = runs if where is None else taken(records, runs, where)
    validate_speed({run.path: run.record.spec for run in runs})
    return pd.DataFrame([row for run in runs for row in _rows(run)], columns=list(COLUMNS))


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    source = run.record.provenance
    common = {
        "model": run.get("model.name"),
        "bits": run.get("bits.name"),
        "method": run.get("method.name"),
        "seed": run.get("seed"),
        "limit": run.get("tasks.limit"),
        "digest": run.record.digest,
        "git_sha": source.get("git_sha"),
        "git_dirty": source.get("git_dirty"),
        "device": source.get("device_name"),
        "record": run.path.name,
    }
    names = run.get("tasks.names")
    for score in run.record.scores:
        yield common | score.model_dump(exclude={"higher_is_better"}) | {"requested": score.task in names}


def beside(record: RecordHead, baseline: RecordHead | None) -> pd.DataFrame:
    """Return the scores of a run with those of its full-precision twin.

    Beside the columns of `scores_frame` there are `full` and, of fractions, `difference`: to full precision, NaN where
    it has no such score. Fidelity is measured against full precision, which has none.
    """
    key = ["task", "metric", "filter"]
    own, full = (scores_frame([Run(Path(), one)] if one is not None else []) for one in (record, baseline))
    full = full.loc[[not is_fidelity(task) for task in full["task"]]]
    frame = own.merge(full[[*key, "value"]].rename(columns={"value": "full"}), "left", on=key)
    return frame.assign(difference=(frame["value"] - frame["full"]).where(frame["unit"] == "fraction"))


def steps_frame(runs: Iterable[Run]) -> pd.DataFrame:
    """Return fidelity along trajectories of full precision: record, prompt, step and a column a metric.

    There are columns of `AT_STEPS` whatever was measured, NaN where nothing was. Rows are in the order of runs, and in
    that of their items.

    Raises:
        RecordError: items that are missing or damaged.
    """
    rows = [
        {"record": run.path.name} | row
        for run in runs
        for row in read_raw(run.path, FIDELITY)
        if row.get("step") is not None
    ]
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=[*dict.fromkeys(["record", "prompt", "step", *AT_STEPS, *frame.columns])])


def by_step(steps: pd.DataFrame, metric: str) -> dict[int, list[float]]:
    """Return, for every step of a `steps_frame`, one value a prompt, in their order: the mean over its records."""
    if metric not in steps:
        return {}
    means = steps.dropna(subset=metric).groupby(["step", "prompt"], sort=False)[metric].mean()
    of_steps: Any = means.groupby("step")  # a key of it may be anything, says its stub
    return {int(step): of_step.tolist() for step, of_step in of_steps}


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
