"""Run lm-eval task by task and turn what it reports into `Score`s and per-item logs."""

from __future__ import annotations

import functools
import logging
import operator
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from starquant.config.model import ModelSpec
from starquant.config.tasks import TasksSpec, validate_consent
from starquant.evaluation.code_execution import agreed_to
from starquant.evaluation.library_output import labelled
from starquant.evaluation.lm import DiffusionLM
from starquant.evaluation.prompts import CUT, CutItems
from starquant.evaluation.responses import ResponseLog
from starquant.evaluation.suites import quiet, task_manager
from starquant.store.record import Score

log = logging.getLogger(__name__)

#: Characters of a prompt, its last ones, that an item keeps: the question, not the examples in front of it.
QUESTION = 400
_UNITS = {"mc_stderr": "nats", "compile_difference": "nats", "compile_flips": "fraction"} | dict.fromkeys(
    CUT, "fraction"
)
#: Tasks whose answers go on with the prompt, as lm-eval's humaneval_instruct words them; the stop strings are ours.
_COMPLETIONS: dict[str, dict[str, Any]] = {
    "humaneval": {
        "doc_to_text": "Write a solution to the following problem and make sure that it passes the tests:\n"
        "```python\n{{ prompt }}\n```\n",
        "gen_prefix": "Here is the completed function:\n```python\n{{ prompt }}\n",
        "generation_kwargs": {
            "until": ["```", "\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 1024,
            "do_sample": False,
        },
    }
}
_NOT_METRICS = {"alias", "name", "sample_len", "sample_count"}


@dataclass(frozen=True)
class Evaluation:
    """What the tasks came to.

    Attributes:
        scores: of all tasks.
        items: one row an item and filter for every leaf task.
        seconds: of the clock, task by task; of another evaluation they differ, and it is the same all the same.
    """

    scores: list[Score]
    items: dict[str, list[dict[str, Any]]]
    seconds: dict[str, float] = field(compare=False)


def evaluate(
    lm: DiffusionLM,
    model: ModelSpec,
    tasks: TasksSpec,
    answers: Path | None = None,
    verbose: bool = False,
    documents: Callable[[str, list[str]], None] | None = None,
) -> Evaluation:
    """Score every task under the model's protocol.

    Args:
        lm: the model.
        model: its protocol, task by task.
        tasks: what to score.
        answers: folder that keeps single answers, so that a killed run goes on; None keeps none.
        verbose: show lm-eval's own log.
        documents: shown the text of the items of each leaf task.

    Raises:
        ConsentError: a task runs model-written code without consent, or in a sandbox that does not hold.
        ConfigError: an unknown task.
    """
    validate_consent(tasks)
    scores: list[Score] = []
    items: dict[str, list[dict[str, Any]]] = {}
    seconds: dict[str, float] = {}
    with quiet(verbose), agreed_to(tasks), task_manager(tasks) as manager:
        for name in tasks.names:
            began = time.perf_counter()
            lm.responses = ResponseLog(None if answers is None else answers / f"{name}.jsonl", lm.rank)
            results, cut = _results(lm, model, tasks, name, manager), _gathered(lm)
            seconds[name] = time.perf_counter() - began
            if results is None:  # the first process has them
                continue
            for sentence in cut.sentences(name, lm.predict.config.context_length):
                log.warning("%s", sentence)
            task_scores = parse_scores(results, name)
            scores += [*task_scores, *_beside(task_scores[0], lm.costs, "shortcuts")]
            scores += _beside(task_scores[0], cut.shares(), "prompts")
            items |= {leaf: [_item(row) for row in rows] for leaf, rows in results["samples"].items()}
            for leaf, rows in results["samples"].items() if documents is not None else ():
                documents(leaf, [_document(row["doc"]) for row in rows])
    return Evaluation(scores, items, seconds)


def _results(lm: DiffusionLM, model: ModelSpec, tasks: TasksSpec, name: str, manager: TaskManager) -> Any:
    """Return what lm-eval says of one task; None on all processes but the first."""
    lm.task, lm.protocol, lm.templated = name, model.protocol[name], model.chat_template == "auto"
    lm.cut = CutItems()
    with labelled(lm.progress, name):
        return lm_eval.simple_evaluate(
            model=lm,
            tasks=[instructed(name, manager) if lm.templated else name],
            num_fewshot=lm.protocol.num_fewshot,
            limit=tasks.limit,
            task_manager=manager,
            apply_chat_template=lm.templated,
            fewshot_as_multiturn=lm.templated,
            confirm_run_unsafe_code=tasks.allow_code_execution,
            log_samples=True,
        )


def answer_some(lm: DiffusionLM, model: ModelSpec, tasks: TasksSpec, name: str, items: int) -> tuple[int, int]:
    """Answer the first items of a task, of a group those of each member.

    Returns:
        How many items were answered, and how many `tasks` asks for.

    Raises:
        ConsentError: a task runs model-written code without consent.
        ConfigError: an unknown task.
    """
    validate_consent(tasks)
    fewer = tasks.model_copy(update={"limit": min(items, tasks.limit or items)})
    lm.responses = ResponseLog(None)
    with quiet(verbose=False), agreed_to(tasks), task_manager(tasks) as manager:
        sizes = _results(lm, model, fewer, name, manager)["n-samples"].values()
    return sum(n["effective"] for n in sizes), sum(min(n["original"], tasks.limit or n["original"]) for n in sizes)


def instructed(name: str, manager: TaskManager) -> str | Task:
    """Return a task as a model that is talked to gets it: a completion becomes a question with the answer begun."""
    if name not in _COMPLETIONS:
        return name
    task: Task = manager.load([name])["tasks"][name]
    for key, value in _COMPLETIONS[name].items():
        task.set_config(key, value)
    return task


def parse_scores(results: Any, requested: str) -> list[Score]:
    """Return one Score for each (task, metric, filter), the requested task or group first."""
    leaves = {task: int(n["effective"]) for task, n in results["n-samples"].items()}
    members = results.get("group_subtasks", {})

    def size(task: str) -> int:
        """Items of a task; of a group, those of all its members."""
        return leaves[task] if task in leaves else sum(size(member) for member in members.get(task, leaves))

    scores = []
    for task, row in sorted(results["results"].items(), key=lambda pair: (pair[0] != requested, pair[0])):
        for key, value in row.items():
            metric, _, filter_name = key.partition(",")
            if key in _NOT_METRICS or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = row.get(f"{metric}_stderr,{filter_name}")
            scores.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    n=size(task),
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                    task_version=_text(results["versions"].get(task)),
                    num_fewshot=_fewshot(results, task),
                )
            )
    return scores


def _gathered(lm: DiffusionLM) -> CutItems:
    """Return what all processes had to cut of a task; of those that are not the first, their own."""
    of_processes: list[CutItems] = lm.together.gather_objects(lm.cut) or [lm.cut]
    return functools.reduce(operator.or_, of_processes)


def _beside(like: Score, values: Mapping[str, float], filter_name: str) -> list[Score]:
    """Return what is told of a task beside its score: what shortcuts cost, the share of items that are cut."""
    nothing = {"stderr": None, "higher_is_better": False, "filter": filter_name}
    return [
        like.model_copy(update={"metric": metric, "value": value, "unit": _UNITS[metric], **nothing})
        for metric, value in values.items()
    ]


def _fewshot(results: Any, task: str) -> int | None:
    """Return a task's few-shot number; a group's is that of its members."""
    shots = results["n-shot"]
    number = shots.get(task, next(iter(shots.values()), None))
    return int(number) if isinstance(number, int | float) else None


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _document(doc: Any) -> str:
    """Return all text of an item."""
    if isinstance(doc, dict):
        return " ".join(_document(value) for value in doc.values())
    return " ".join(map(_document, doc)) if isinstance(doc, list) else str(doc) if isinstance(doc, str) else ""


def _item(row: dict[str, Any]) -> dict[str, Any]:
    """Keep what later tables need of one item: identity, the end of its prompt, target, answers and metrics."""
    dropped = {"doc", "arguments", "prompt_hash", "target_hash"}
    kept = {key: value for key, value in row.items() if key not in dropped}
    prompt = next((request[0] for request in row.get("arguments") or ()), None)
    return kept | ({"question": prompt[-QUESTION:]} if isinstance(prompt, str) else {})
