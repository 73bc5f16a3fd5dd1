"""Send one record to Weights & Biases: `python -m starquant.tracking.wandb_worker RECORD --project P --mode offline`.

The only file that imports wandb. The W&B run id is the record's digest: publishing again resumes the same run.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from starquant.errors import RecordError
from starquant.store.files import write_atomically
from starquant.store.items import items_folder
from starquant.store.record import RunRecord
from starquant.store.records import read_record
from starquant.tracking.tracker import marker_of

CURVES = ("hidden_mse", "kl")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of dotted names."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}{key}.").items()}
    return {prefix[:-1]: value}


def publish(path: Path, folder: Path, project: str, entity: str | None, mode: str) -> None:
    """Log configuration, scores, timings and the record itself as one W&B run."""
    for name in ("DATA", "CACHE"):  # copies of artifacts are sent later: they stay with the run, not below the home
        os.environ.setdefault(f"WANDB_{name}_DIR", str(folder))
    import wandb

    record = read_record(path)
    spec = record.spec
    run = wandb.init(
        id=record.digest,
        resume="allow",
        project=project,
        entity=entity,
        mode="offline" if mode == "offline" else "online",
        dir=str(folder),
        name=f"{spec['model']['name']}-{spec['bits']['name']}-{spec['method']['name']}",
        group=(spec.get("experiment") or {}).get("name") or spec["tasks"]["name"],
        job_type=spec["method"]["name"],
        config=flatten(spec) | {"digest": record.digest, "git_sha": record.provenance.get("git_sha")},
    )
    run.summary.update(summary(record))
    table = wandb.Table(columns=["task", "metric", "filter", "value", "stderr", "n"])
    for s in record.scores:
        table.add_data(s.task, s.metric, s.filter, s.value, s.stderr, s.n)
    run.log({"scores": table})
    _log_fidelity(run, path)
    artifact = wandb.Artifact(f"record-{record.digest}", type="record")
    artifact.add_file(str(path))
    run.log_artifact(artifact)
    run.finish()
    marker = marker_of(folder, record.digest, project, mode, entity)
    write_atomically(marker, str(record.provenance.get("finished_at")))


def _log_fidelity(run: Any, path: Path) -> None:
    """Log fidelity along the denoising steps, as numbers and as a figure; nothing where it was not measured."""
    import wandb

    from starquant.reports.figures import by_step, trajectory

    if not (items_folder(path) / "fidelity.jsonl").exists():
        return
    run.define_metric("fidelity/*", step_metric="denoising_step")
    curves = {metric: by_step([path], metric) for metric in CURVES}
    for step in sorted(curves["hidden_mse"]):
        means = {f"fidelity/{m}": sum(c[step]) / len(c[step]) for m, c in curves.items() if step in c}
        run.log({"denoising_step": step + 1} | means)
    try:
        figure = trajectory([(path.stem, path)])
    except RecordError as error:  # a step that one prompt alone has come to has no interval
        print(f"no figure: {error}", flush=True)
        return
    run.log({"figures/trajectory": wandb.Image(figure)})


def summary(record: RunRecord) -> dict[str, float]:
    """Return scores and timings under the names W&B charts by."""
    scores = {f"score/{s.task}/{s.metric},{s.filter}": s.value for s in record.scores}
    return scores | {f"seconds/{name}": value for name, value in record.timings.seconds.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--entity")
    parser.add_argument("--mode", choices=("online", "offline"), required=True)
    args = parser.parse_args()
    publish(args.record, args.dir, args.project, args.entity, args.mode)


if __name__ == "__main__":
    main()
