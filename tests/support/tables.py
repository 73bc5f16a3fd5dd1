"""Records with made-up numbers, for tests of tables."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from starquant.config.run import RunSpec
from starquant.store.record import RunRecord, Score
from starquant.store.records import RecordStore
from tests.support.records import fidelity_rows, make_record
from tests.support.specs import compose, spec

FACTS, PROFILES = "testbed_facts", "testbed_profiles"
Values = Mapping[str, Sequence[float]]


@functools.cache
def _template() -> RunRecord:
    return make_record(spec())


def run_of(
    method: str, bits: str = "w4a4", model: str = "tiny", changes: Mapping[str, Any] | None = None, **seeds: Any
) -> RunSpec:
    """A specification; `changes` by dotted key, `seed` of the model and `rotation` of the method."""
    config = compose(f"method={method}", f"bits={bits}", f"model={model}")
    named = {"seed": "model.seed", "rotation": "method.rotation_seed"}
    for dotted, value in {**(changes or {}), **{named[name]: value for name, value in seeds.items()}}.items():
        *parents, leaf = dotted.split(".")
        here = config
        for parent in parents:
            here = here[parent]
        here[leaf] = value
    run = RunSpec.from_config(config)
    return run.baseline() if run.is_baseline else run


def score(task: str, value: float, metric: str = "acc", filter_name: str = "none", **more: Any) -> Score:
    common = {"stderr": None, "n": 1, "higher_is_better": True, "task_version": "1.0", "num_fewshot": 0}
    return Score(task=task, metric=metric, filter=filter_name, value=value, **(common | more))


def rows_of(task: str, values: Sequence[float], metric: str = "acc", filter_name: str = "none") -> list[dict[str, Any]]:
    """Items in an order of their own, as tasks on several threads would leave them."""
    rows = [
        {"doc_id": i, "doc_hash": f"{task}{i}", "filter": filter_name, "metrics": [metric], metric: value}
        for i, value in enumerate(values)
    ]
    return random.Random(len(values)).sample(rows, len(rows))


def put(
    folder: Path,
    values: Values,
    method: str = "rtn",
    *args: Any,
    kl: Sequence[float] | None = None,
    dirty: bool | None = False,
    metric: str = "acc",
    filter_name: str = "none",
    groups: Sequence[str] = (),
    **seeds: Any,
) -> Path:
    """Write a record of these items.

    `told` overrides fields of scores, `documents` are digests of a hub's, `groups` are scored by all their leaf tasks.
    """
    told, documents = seeds.pop("told", {}), seeds.pop("documents", None)
    changes = {"tasks.names": list(groups or values), "tasks.name": "made_up", **seeds.pop("changes", {})}
    run = run_of(method, *args, changes=changes, **seeds)
    scores = [
        score(t, float(np.mean(own)), metric, filter_name, **{"n": len(own), **told}) for t, own in values.items()
    ]
    for group in groups:
        own = np.concatenate([v for task, v in values.items() if task.startswith(f"{group}_")])
        scores.insert(0, score(group, float(own.mean()), metric, filter_name, n=len(own)))
    items = {task: rows_of(task, own, metric, filter_name) for task, own in values.items()}
    if kl is not None:
        scores.append(score("fidelity", float(np.mean(kl)), "kl", "all", unit="nats", n=len(kl)))
        items["fidelity"] = fidelity_rows([[one - 0.01, one + 0.01] for one in kl])
    record = _template().model_copy(
        update={
            "digest": run.digest(),
            "spec": run.model_dump(mode="json"),
            "scores": scores,
            "provenance": {"git_dirty": dirty} | ({"documents": documents} if documents else {}),
        }
    )
    return RecordStore(folder).write(run, record, items)


def answers(seed: int, n: int = 12, share: float = 0.6) -> list[float]:
    """Zeros and ones."""
    return [float(x < share) for x in np.random.default_rng(seed).random(n)]


def put_table(folder: Path, model: str = "tiny", seeds: Sequence[int] = (0, 1), n: int = 12) -> None:
    """Full precision, RTN, QuaRot and STaR-Quant (two rotations) on two tasks."""
    for seed in seeds:
        draw = iter(range(100 * seed, 100 * seed + 100))

        def some(draw=draw) -> dict[str, list[float]]:
            return {FACTS: answers(next(draw), n), PROFILES: answers(next(draw), n)}

        kwargs = {"seed": seed} if model == "tiny" else {}
        put(folder, some(), "none", "w16a16", model, **kwargs)
        put(folder, some(), "rtn", "w4a4", model, kl=[0.3, 0.4, 0.8], **kwargs)
        for rotation in (0, 1):
            for method in ("quarot", "star_quant"):
                put(folder, some(), method, "w4a4", model, kl=[0.1, 0.2, 0.3], rotation=rotation, **kwargs)
