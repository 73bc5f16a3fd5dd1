"""The nine stock lm-eval tasks, read from local JSONL files instead of the hub.

Each generated YAML includes lm-eval's own and changes where the data come from, nothing else: prompts, metrics,
filters and versions stay the stock ones.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from starquant.errors import DataError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class LocalTask:
    """A stock task and its local files.

    Attributes:
        stock: YAML below lm_eval/tasks, "{subject}" for one a subject.
        files: split name of the stock YAML -> file below the data folder.
        fields: what every line must have.
        disable: splits of the stock YAML that have no file here.
        subjects: folder whose file names are the subjects, None for a single task.
    """

    stock: str
    files: dict[str, str]
    fields: tuple[str, ...]
    disable: tuple[str, ...] = ()
    subjects: str | None = None


_CHOICES = ("question", "choices", "answerKey")
LOCAL_TASKS: dict[str, LocalTask] = {
    "truthfulqa_mc2": LocalTask(
        "truthfulqa/truthfulqa_mc2.yaml",
        {"validation": "truthfulqa/validation.jsonl"},
        ("question", "mc1_targets", "mc2_targets"),
    ),
    "arc_challenge": LocalTask(
        "arc/arc_challenge.yaml",
        {split: f"arc_challenge/{split}.jsonl" for split in ("train", "validation", "test")},
        _CHOICES,
    ),
    "hellaswag": LocalTask(
        "hellaswag/hellaswag.yaml",
        {"validation": "hellaswag/validation.jsonl.gz"},
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        disable=("training_split",),
    ),
    "winogrande": LocalTask(
        "winogrande/default.yaml",
        {split: f"winogrande/{split}.jsonl" for split in ("train", "validation")},
        ("sentence", "option1", "option2", "answer"),
    ),
    "piqa": LocalTask(
        "piqa/piqa.yaml",
        {"validation": "piqa/validation.jsonl"},
        ("goal", "sol1", "sol2", "label"),
        disable=("training_split",),
    ),
    "mmlu": LocalTask(
        "mmlu/default/mmlu_{subject}.yaml",
        {"dev": "mmlu/dev/{subject}.jsonl", "test": "mmlu/test/{subject}.jsonl"},
        ("question", "choices", "answer"),
        subjects="mmlu/test",
    ),
    "ceval-valid": LocalTask(
        "ceval/ceval-valid_{subject}.yaml",
        {"dev": "ceval/dev/{subject}.jsonl", "val": "ceval/val/{subject}.jsonl"},
        ("question", "A", "B", "C", "D", "answer"),
        subjects="ceval/val",
    ),
    "humaneval": LocalTask(
        "",
        {"test": "humaneval/test.jsonl"},
        ("task_id", "prompt", "test", "entry_point"),
    ),
    "gsm8k": LocalTask(
        "gsm8k/gsm8k.yaml",
        {split: f"gsm8k/{split}.jsonl" for split in ("train", "test")},
        ("question", "answer"),
    ),
}


def validate_data(data_dir: Path, names: Iterable[str]) -> str:
    """Check every file of the named tasks, line by line, and return a digest of their content.

    Raises:
        DataError: a missing folder or file, a line that is not a JSON object, a missing field; with file and line.
    """
    digest = hashlib.sha256()
    if not data_dir.is_dir():
        raise DataError(f"tasks.data_dir: {data_dir}: no such folder")
    for name in sorted(names):
        if name not in LOCAL_TASKS:
            raise DataError(f"tasks.data_dir: no local layout for task '{name}'; allowed: {', '.join(LOCAL_TASKS)}")
        task = LOCAL_TASKS[name]
        for path in _files(data_dir, task):
            digest.update(f"{path.relative_to(data_dir)}:".encode())
            for line in _validated_lines(path, task.fields):
                digest.update(line)
    return digest.hexdigest()[:16]


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


def _validated_lines(path: Path, fields: tuple[str, ...]) -> Iterator[bytes]:
    opener = gzip.open if path.suffix == ".gz" else open
    count = 0
    try:
        with opener(path, "rb") as stream:
            for count, line in enumerate(stream, 1):
                _validate_line(path, count, line, fields)
                yield line
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if count == 0:
        raise DataError(f"{path}: holds no items")


def _validate_line(path: Path, number: int, line: bytes, fields: tuple[str, ...]) -> None:
    try:
        item = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not valid JSON ({error})") from None
    if not isinstance(item, dict):
        raise DataError(f"{path}, line {number}: expected a JSON object, got {type(item).__name__}")
    missing = [name for name in fields if name not in item]
    if missing:
        raise DataError(f"{path}, line {number}: missing field '{missing[0]}'; required: {', '.join(fields)}")


def write_tasks(data_dir: Path, names: Iterable[str], folder: Path) -> None:
    """Write lm-eval YAMLs for the named tasks into `folder`, under their stock names."""
    data_dir = data_dir.resolve()
    for name in names:
        task = LOCAL_TASKS[name]
        subjects = _subjects(data_dir, task)
        members = [_write_one(data_dir, name, task, subject, folder) for subject in subjects]
        if task.subjects is not None:
            _write_group(name, members, folder)


def _stock_folder() -> Path:
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def _write_one(data_dir: Path, name: str, task: LocalTask, subject: str, folder: Path) -> str:
    files = {split: str(data_dir / file.format(subject=subject)) for split, file in task.files.items()}
    member = Path(task.stock.format(subject=subject)).stem if subject else name
    include = (
        _stock_folder() / task.stock.format(subject=subject) if task.stock else HERE / "tasks/humaneval/humaneval.yaml"
    )
    if not include.exists():
        raise DataError(f"{files[next(iter(files))]}: lm-eval has no task for it ({include.name})")
    config: dict[str, Any] = {
        "include": str(include),
        "task": member,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
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
