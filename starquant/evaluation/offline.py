"""The nine stock lm-eval tasks, read from local JSONL files instead of the hub.

Each generated YAML includes lm-eval's own and changes where the data come from, nothing else: prompts, metrics,
filters and versions stay the stock ones.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from starquant.calibration.json_lines import items_lines, parse_object
from starquant.errors import DataError
from starquant.evaluation.item_fields import (
    Kinds,
    Relation,
    Rule,
    answer_among_labels,
    answers,
    any_text,
    any_value,
    label_among_endings,
    lettered,
    one_of,
    options_that_differ,
    program_to_complete,
    short,
    text,
    texts,
    with_gap,
    worked_answer,
)

HERE = Path(__file__).parent


@dataclass(frozen=True)
class LocalTask:
    """A stock task and its local files.

    Attributes:
        stock: YAML below lm_eval/tasks, "{subject}" for one a subject.
        files: split name of the stock YAML -> file below the data folder.
        fields: what every line must have, and what may stand there.
        relation: of the fields to each other.
        disable: splits of the stock YAML that have no file here.
        subjects: folder whose file names are the subjects, None for a single task.
    """

    stock: str
    files: dict[str, str]
    fields: dict[str, Rule]
    relation: Relation | None = None
    disable: tuple[str, ...] = ()
    subjects: str | None = None


LOCAL_TASKS: dict[str, LocalTask] = {
    "truthfulqa_mc2": LocalTask(
        "truthfulqa/truthfulqa_mc2.yaml",
        {"validation": "truthfulqa/validation.jsonl"},
        {"question": text, "mc1_targets": answers, "mc2_targets": answers},
    ),
    "arc_challenge": LocalTask(
        "arc/arc_challenge.yaml",
        {split: f"arc_challenge/{split}.jsonl" for split in ("train", "validation", "test")},
        {"question": text, "choices": lettered, "answerKey": text},
        relation=answer_among_labels,
    ),
    "hellaswag": LocalTask(
        "hellaswag/hellaswag.yaml",
        {"validation": "hellaswag/validation.jsonl.gz"},
        {"activity_label": text, "ctx_a": any_text, "ctx_b": any_text, "endings": texts(2), "label": any_value},
        relation=label_among_endings,
        disable=("training_split",),
    ),
    "winogrande": LocalTask(
        "winogrande/default.yaml",
        {split: f"winogrande/{split}.jsonl" for split in ("train", "validation")},
        {"sentence": with_gap, "option1": text, "option2": text, "answer": one_of("1", "2")},
        relation=options_that_differ,
    ),
    "piqa": LocalTask(
        "piqa/piqa.yaml",
        {"validation": "piqa/validation.jsonl"},
        {"goal": text, "sol1": text, "sol2": text, "label": one_of(0, 1)},
        disable=("training_split",),
    ),
    "mmlu": LocalTask(
        "mmlu/default/mmlu_{subject}.yaml",
        {"dev": "mmlu/dev/{subject}.jsonl", "test": "mmlu/test/{subject}.jsonl"},
        {"question": text, "choices": texts(4, 4), "answer": one_of(0, 1, 2, 3)},
        subjects="mmlu/test",
    ),
    "ceval-valid": LocalTask(
        "ceval/ceval-valid_{subject}.yaml",
        {"dev": "ceval/dev/{subject}.jsonl", "val": "ceval/val/{subject}.jsonl"},
        {"question": text, "A": text, "B": text, "C": text, "D": text, "answer": one_of("A", "B", "C", "D")},
        subjects="ceval/val",
    ),
    "humaneval": LocalTask(
        "",
        {"test": "humaneval/test.jsonl"},
        {"task_id": text, "prompt": text, "test": text, "entry_point": text},
        relation=program_to_complete,
    ),
    "gsm8k": LocalTask(
        "gsm8k/gsm8k.yaml",
        {split: f"gsm8k/{split}.jsonl" for split in ("train", "test")},
        {"question": text, "answer": worked_answer},
    ),
}


def validate_data(data_dir: Path, names: Iterable[str]) -> str:
    """Check every file of the named tasks, line by line, and return a digest of their content.

    Raises:
        DataError: a missing folder or file, one that is no regular file, a line that is not a JSON object, a field that
            is missing or holds what it may not; with file and line.
    """
    if not data_dir.is_dir():
        raise DataError(f"tasks.data_dir: {data_dir}: no such folder")
    names = tuple(names)
    for name in names:
        if name not in LOCAL_TASKS:
            raise DataError(f"tasks.data_dir: no local layout for task '{name}'; allowed: {', '.join(LOCAL_TASKS)}")
    return _digest(data_dir, names, _validated_lines)


def _digest(data_dir: Path, names: Iterable[str], lines_of: Callable[[Path, LocalTask], Iterable[bytes]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        for path in _files(data_dir, LOCAL_TASKS[name]):
            digest.update(f"{path.relative_to(data_dir)}:".encode())
            for line in lines_of(path, LOCAL_TASKS[name]):
                digest.update(line)
    return digest.hexdigest()[:16]


def _lines(path: Path, _: LocalTask) -> Iterator[bytes]:
    return (line for _, _, line in items_lines(path, str(path)))


def _subjects(data_dir: Path, task: LocalTask) -> list[str]:
    if task.subjects is None:
        return [""]
    subjects = sorted(path.stem for path in (data_dir / task.subjects).glob("*.jsonl"))
    if not subjects:
        raise DataError(f"{data_dir / task.subjects}: no subject files (*.jsonl) there")
    return subjects


def _files(data_dir: Path, task: LocalTask) -> list[Path]:
    subjects = _subjects(data_dir, task)
    return [data_dir / file.format(subject=subject) for subject in subjects for file in task.files.values()]


def _validated_lines(path: Path, task: LocalTask) -> Iterator[bytes]:
    kinds, line = Kinds(), b""
    for _, place, line in items_lines(path, str(path)):
        item = parse_object(line, place)
        missing = [name for name in task.fields if name not in item]
        if missing:
            raise DataError(f"{place}: missing field '{missing[0]}'; required: {', '.join(task.fields)}")
        fields = ((name, rule(item[name])) for name, rule in task.fields.items())
        wrong = next(((name, allowed) for name, allowed in fields if allowed is not None), None)
        wrong = wrong or (task.relation and task.relation(item)) or kinds.clash(item)
        if wrong:
            got = f"is {short(item[wrong[0]])}" if wrong[0] in item else "is of another kind"
            raise DataError(f"{place}: field {short(wrong[0])} {got}, allowed: {wrong[1]}")
        yield line
    if not line:
        raise DataError(f"{path}: holds no items")


def write_tasks(data_dir: Path, names: Sequence[str], folder: Path, fingerprint: str | None = None) -> None:
    """Write lm-eval YAMLs for the named tasks into `folder`, under their stock names, and copies of their files.

    Args:
        data_dir: folder of the files.
        names: of the tasks.
        folder: that is there as long as the tasks are.
        fingerprint: what `validate_data` returned of the files that are meant; None for whichever are there.

    Raises:
        DataError: files that cannot be copied, other ones than those of the fingerprint.
    """
    copied = folder.resolve() / "items"
    _copy(data_dir, names, copied)
    if fingerprint is not None and _digest(copied, names, _lines) != fingerprint:
        raise DataError(f"tasks.data_dir: {data_dir}: its files have changed since the run began; start it again")
    for name in names:
        task = LOCAL_TASKS[name]
        subjects = _subjects(copied, task)
        members = [_write_one(data_dir, copied, name, task, subject, folder) for subject in subjects]
        if task.subjects is not None:
            _write_group(name, members, folder)


def _copy(data_dir: Path, names: Iterable[str], target: Path) -> None:
    """Copy the files of tasks: datasets knows a file by its path and time, and would serve what it held before."""
    for name in names:
        for path in _files(data_dir, LOCAL_TASKS[name]):
            copy = target / path.relative_to(data_dir)
            try:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            except OSError as error:
                raise DataError(f"{path}: cannot be copied to {target}: {error.strerror or error}") from None


def _stock_folder() -> Path:
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def _write_one(data_dir: Path, copied: Path, name: str, task: LocalTask, subject: str, folder: Path) -> str:
    files = {split: file.format(subject=subject) for split, file in task.files.items()}
    member = Path(task.stock.format(subject=subject)).stem if subject else name
    include = (
        _stock_folder() / task.stock.format(subject=subject) if task.stock else HERE / "tasks/humaneval/humaneval.yaml"
    )
    if not include.exists():
        raise DataError(f"{data_dir / files[next(iter(files))]}: lm-eval has no task for it ({include.name})")
    config: dict[str, Any] = {
        "include": str(include),
        "task": member,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(copied / file) for split, file in files.items()},
            "cache_dir": str(folder / "cache"),  # the user's would be filled with what nothing can find again
        },
        **dict.fromkeys(task.disable),
    }
    (folder / f"{member}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return member


def _write_group(name: str, members: list[str], folder: Path) -> None:
    # As lm-eval's own group: the mean over all items of all subjects.
    metrics = ["acc"] if name == "mmlu" else ["acc", "acc_norm"]
    config = {
        "group": name,
        "task": members,
        "aggregate_metric_list": [{"metric": m, "aggregation": "mean", "weight_by_size": True} for m in metrics],
        "metadata": {"version": 2},
    }
    (folder / f"_{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
