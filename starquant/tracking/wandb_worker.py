"""Send one run to Weights & Biases: `python -m starquant.tracking.wandb_worker RECORD --project P --mode offline`.

The only file that imports wandb. The W&B run id is the run's digest: publishing again resumes the same run, also one
that has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from starquant.errors import RecordError, StarquantError
from starquant.reports.frame import beside
from starquant.store.files import write_atomically
from starquant.store.items import items_folder
from starquant.store.record import RunRecord
from starquant.store.records import read_record, twin_of
from starquant.tracking.description import run_name, settings_used
from starquant.tracking.live import follow
from starquant.tracking.tracker import marker_of

CURVES = ("hidden_mse", "kl")


def start(folder: Path, spec: dict[str, Any], digest: str, settings: dict[str, Any], **config: Any) -> Any:
    """Return the W&B run of a digest, new or resumed.

    Its configuration is what it used of its specification.

    Args:
        folder: of W&B's own files.
        spec: as in a record.
        digest: of the run.
        settings: project, entity and mode.
        config: to stand beside the settings.
    """
    for name in ("DATA", "CACHE"):  # copies of artifacts are sent later: they stay with the run, not below the home
        os.environ.setdefault(f"WANDB_{name}_DIR", str(folder))
    if os.path.expanduser("~") == "~":  # W&B looks there for settings and keys, and ends where no home is known
        os.environ["HOME"] = str(folder)
    import wandb

    return wandb.init(
        id=digest,
        resume="allow",
        dir=str(folder),
        name=run_name(spec),
        group=(spec.get("experiment") or {}).get("name") or spec["tasks"]["name"],
        job_type=spec["method"]["name"],
        config=settings_used(spec) | {"digest": digest} | config,
        **settings,
    )


def publish(path: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Log configuration, scores, timings and the record itself as one W&B run."""
    record = read_record(path)
    run = start(folder, record.spec, record.digest, settings, git_sha=record.provenance.get("git_sha"))
    _log_record(run, record, path)
    run.finish()
    write_atomically(marker_of(folder, record.digest, **settings), str(record.provenance.get("finished_at")))


def publish_live(path: Path, folder: Path, settings: dict[str, Any], process: int) -> None:
    """Log the run of a process as it is computed, up to its record or failure."""
    lines = follow(path, process)
    first = next(lines)
    digest, marker = first["digest"], marker_of(folder, first["digest"], **settings)
    run = start(folder, first["spec"], digest, settings)
    for name in ("loss/*", "sqnr_db/*"):
        run.define_metric(name, step_metric="block")
    line: dict[str, Any] = {}
    for line in lines:
        words = {name: value for name, value in line.get("figures", {}).items() if isinstance(value, str)}
        run.summary.update(words)
        if numbers := {name: value for name, value in line.get("figures", {}).items() if name not in words}:
            run.log(numbers)
    if line["record"] is None:
        run.summary["error"] = line["error"]
        run.finish(exit_code=1)
        marker.unlink(missing_ok=True)
    else:
        record = read_record(Path(line["record"]))
        run.config.update({"git_sha": record.provenance.get("git_sha")}, allow_val_change=True)
        run.summary["stage"] = "finished"
        _log_record(run, record, Path(line["record"]))
        run.finish()
        write_atomically(marker, str(record.provenance.get("finished_at")))
    path.unlink(missing_ok=True)


def _log_record(run: Any, record: RunRecord, path: Path) -> None:
    """Log scores, timings and the record itself."""
    import wandb

    run.summary["error"] = None  # of an earlier attempt
    run.summary.update(summary(record) | differences(record, path))
    scores = beside(record, None)[["task", "metric", "filter", "value", "stderr", "n"]].astype(object)
    lines: list[Any] = scores.where(scores.notna(), None).values.tolist()
    run.log({"scores": wandb.Table(columns=[*scores.columns], data=lines)})
    _log_fidelity(run, path)
    artifact = wandb.Artifact(f"record-{record.digest}", type="record")
    artifact.add_file(str(path))
    run.log_artifact(artifact)


def publish_failure(path: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Log configuration and error of a run that has no record as a W&B run in state failed."""
    content = json.loads(path.read_text(encoding="utf-8"))
    run = start(folder, content["spec"], content["digest"], settings)
    run.summary["error"] = content["error"]
    run.finish(exit_code=1)
    marker_of(folder, content["digest"], **settings).unlink(missing_ok=True)  # the record is to be told again
    path.unlink()


def _log_fidelity(run: Any, path: Path) -> None:
    """Log fidelity along the denoising steps, as numbers and as a figure; nothing where it was not measured."""
    import wandb

    from starquant.reports.figures import save, steps_of, trajectory

    if not (items_folder(path) / "fidelity.jsonl").exists():
        return
    run.define_metric("fidelity/*", step_metric="denoising_step")
    curves = {metric: steps_of([path], metric) for metric in CURVES}
    for step in sorted(curves["hidden_mse"]):
        means = {f"fidelity/{m}": sum(c[step]) / len(c[step]) for m, c in curves.items() if step in c}
        run.log({"denoising_step": step + 1} | means)
    try:
        figure = trajectory([(path.stem, path)])
    except RecordError as error:  # a step that one prompt alone has come to has no interval
        print(f"no figure: {error}", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:  # W&B copies the file as it is logged
        png, _ = save(figure, Path(folder) / "trajectory")
        run.log({"figures/trajectory": wandb.Image(str(png))})


def summary(record: RunRecord) -> dict[str, float]:
    """Return scores and timings under the names W&B charts by."""
    scores = {f"score/{s.task}/{s.metric},{s.filter}": s.value for s in record.scores}
    return scores | {f"seconds/{name}": value for name, value in record.timings.seconds.items()}


def differences(record: RunRecord, path: Path) -> dict[str, float]:
    """Return scores less those of the full-precision record beside it; nothing where there is none."""
    try:
        twin = twin_of(path)
        full = None if twin is None else read_record(twin)
    except StarquantError:
        return {}
    frame = beside(record, full).dropna(subset="difference")
    names = "difference/" + frame["task"] + "/" + frame["metric"] + "," + frame["filter"]
    return dict(zip(names.tolist(), frame["difference"].tolist(), strict=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a record, or with --failed what the tracker has left of a failed run")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--failed", action="store_true")
    kinds.add_argument("--live", type=int, metavar="PID", help="follow the file that the run of a process appends to")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--entity")
    parser.add_argument("--mode", choices=("online", "offline"), required=True)
    args = parser.parse_args()
    settings = {"project": args.project, "entity": args.entity, "mode": args.mode}
    if args.live is not None:
        publish_live(args.path, args.dir, settings, args.live)
        return
    tell = publish_failure if args.failed else publish
    tell(args.path, args.dir, settings)


if __name__ == "__main__":
    main()
