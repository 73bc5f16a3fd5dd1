"""Benchmarks from local JSONL files: what is checked, what is refused, and that tasks stay the stock ones."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from starquant.errors import DataError
from starquant.evaluation.offline import validate_data, write_tasks
from starquant.evaluation.suites import TASK_FOLDER

STOCK = Path(lm_eval.__file__).parent / "tasks"
NINE = {
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "mmlu": "mmlu/default/_mmlu.yaml",
    "ceval-valid": "ceval/_ceval-valid.yaml",
    "humaneval": "humaneval/humaneval.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
_MC = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1}
_ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
_CEVAL = {"question": "q", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "B"}
ROWS: dict[str, dict[str, Any]] = {
    "truthfulqa/validation.jsonl": {
        "question": "q",
        "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]},
    },
    "arc_challenge/train.jsonl": _ARC,
    "arc_challenge/validation.jsonl": _ARC,
    "arc_challenge/test.jsonl": _ARC,
    "hellaswag/validation.jsonl.gz": {
        "activity_label": "x",
        "ctx_a": "a",
        "ctx_b": "b",
        "endings": ["a", "b", "c", "d"],
        "label": "0",
    },
    "winogrande/train.jsonl": {"sentence": "the _ runs", "option1": "a", "option2": "b", "answer": "1"},
    "winogrande/validation.jsonl": {"sentence": "the _ runs", "option1": "a", "option2": "b", "answer": "1"},
    "piqa/validation.jsonl": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
    "mmlu/dev/anatomy.jsonl": _MC,
    "mmlu/test/anatomy.jsonl": _MC,
    "mmlu/dev/virology.jsonl": _MC,
    "mmlu/test/virology.jsonl": _MC,
    "ceval/dev/law.jsonl": _CEVAL,
    "ceval/val/law.jsonl": _CEVAL,
    "humaneval/test.jsonl": {"task_id": "t/0", "prompt": "def f():\n", "test": "def check(f): f()", "entry_point": "f"},
    "gsm8k/train.jsonl": {"question": "q", "answer": "a #### 1"},
    "gsm8k/test.jsonl": {"question": "q", "answer": "a #### 1"},
}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two items of every file of the nine tasks."""
    for name, row in ROWS.items():
        _write(tmp_path / "data" / name, 2 * (json.dumps(row) + "\n"))
    return tmp_path / "data"


def test_complete_files_are_accepted(data: Path) -> None:
    digest = validate_data(data, NINE)
    assert len(digest) == 16
    assert int(digest, 16) >= 0


def test_only_the_named_tasks_are_read(data: Path) -> None:
    shutil.rmtree(data / "gsm8k")
    validate_data(data, [name for name in NINE if name != "gsm8k"])
    with pytest.raises(DataError, match="gsm8k"):
        validate_data(data, NINE)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder") as caught:
        validate_data(tmp_path / "nowhere", ["piqa"])
    assert str(tmp_path / "nowhere") in str(caught.value)


@pytest.mark.parametrize("name", [name for name in ROWS if "/test/" not in name and "/val/" not in name])
def test_a_missing_file_is_named(data: Path, name: str) -> None:
    (data / name).unlink()
    with pytest.raises(DataError, match="no such file") as caught:
        validate_data(data, NINE)
    assert str(data / name) in str(caught.value)


@pytest.mark.parametrize("folder", ["mmlu/test", "ceval/val"])
def test_a_group_without_subjects_is_refused(data: Path, folder: str) -> None:
    shutil.rmtree(data / folder)
    with pytest.raises(DataError, match="no subject files") as caught:
        validate_data(data, ["mmlu", "ceval-valid"])
    assert str(data / folder) in str(caught.value)


@pytest.mark.parametrize("name", ROWS)
def test_an_empty_file_is_refused(data: Path, name: str) -> None:
    _write(data / name, "")
    with pytest.raises(DataError, match="holds no items") as caught:
        validate_data(data, NINE)
    assert str(data / name) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"goal": "g", ', "not valid JSON"),
        ("goal,sol1,sol2", "not valid JSON"),
        ("", "not valid JSON"),
        ('["g", "a", "b", 0]', "expected a JSON object, got list"),
        ("3", "expected a JSON object, got int"),
        ("null", "expected a JSON object, got NoneType"),
        ('{"goal": "g", "sol1": "a", "label": 0}', "missing field 'sol2'"),
    ],
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_bad_line_is_named_by_file_and_number(data: Path, line: str, problem: str, number: int) -> None:
    path = data / "piqa/validation.jsonl"
    lines = 4 * [json.dumps(ROWS["piqa/validation.jsonl"])]
    lines[number - 1] = line
    _write(path, "\n".join(lines) + "\n")
    with pytest.raises(DataError, match=problem) as caught:
        validate_data(data, ["piqa"])
    assert f"{path}, line {number}:" in str(caught.value)


def test_a_line_that_is_not_utf8_is_refused(data: Path) -> None:
    (data / "piqa/validation.jsonl").write_bytes(b'{"goal": "\xff", "sol1": "", "sol2": "", "label": 0}\n')
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        validate_data(data, ["piqa"])


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, row in ROWS.items() for field in row])
def test_every_field_is_required(data: Path, name: str, field: str) -> None:
    row = {key: value for key, value in ROWS[name].items() if key != field}
    _write(data / name, json.dumps(ROWS[name]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        validate_data(data, NINE)
    assert f"{data / name}, line 2: missing field '{field}'" in str(caught.value)


def _bad(name: str, field: str, *values: object) -> list[tuple[str, str, object]]:
    return [(name, field, value) for value in values]


#: Values that lm-eval would score wrongly, or fail on with a traceback in the middle of a run.
BAD_VALUES = [
    *_bad("piqa/validation.jsonl", "label", "0", 2, -1, True, None, 0.0, [0], {}),
    *_bad("piqa/validation.jsonl", "goal", "", "  ", 3, None, ["g"], True),
    *_bad("piqa/validation.jsonl", "sol2", "", 1),
    *_bad("hellaswag/validation.jsonl.gz", "label", "4", "x", "", -1, 9, True, 1.0, None, "0.0"),
    *_bad("hellaswag/validation.jsonl.gz", "endings", [], ["a"], "abcd", ["a", 1], ["a", ""], None, {"a": "b"}),
    *_bad("hellaswag/validation.jsonl.gz", "ctx_b", None, 1),
    *_bad("winogrande/train.jsonl", "answer", "3", "", 1, "A", None),
    *_bad("winogrande/validation.jsonl", "sentence", "no gap", "two _ gaps _", "", 1),
    *_bad("winogrande/train.jsonl", "option2", "a", " a "),
    *_bad("winogrande/validation.jsonl", "option1", "", None),
    *_bad("mmlu/test/anatomy.jsonl", "answer", 4, -1, "1", "B", True, 1.0),
    *_bad("mmlu/dev/anatomy.jsonl", "choices", ["a", "b", "c"], ["a", "b", "c", "d", "e"], "abcd", [1, 2, 3, 4]),
    *_bad("ceval/val/law.jsonl", "answer", "E", "a", "", 1, "AB"),
    *_bad("ceval/dev/law.jsonl", "C", "", 3),
    *_bad("arc_challenge/test.jsonl", "answerKey", "C", "", 1, None, "AB"),
    *_bad(
        "arc_challenge/train.jsonl",
        "choices",
        {"text": ["a", "b"], "label": ["A"]},
        {"text": ["a", "b"], "label": ["A", "A"]},
        {"text": ["a", "b"]},
        {"text": "ab", "label": "AB"},
        ["a", "b"],
    ),
    *_bad(
        "truthfulqa/validation.jsonl",
        "mc2_targets",
        {"choices": ["a", "b"], "labels": [1]},
        {"choices": ["a", "b"], "labels": [1, 1]},
        {"choices": ["a", "b"], "labels": [0, 0]},
        {"choices": ["a", "b"], "labels": [1, 2]},
        {"choices": ["a", "b"], "labels": [True, False]},
        {"choices": ["a", 1], "labels": [1, 0]},
        {"choices": [], "labels": []},
        [],
    ),
    *_bad("gsm8k/test.jsonl", "answer", "12", "", 12, "a ####", "#### x", None),
    *_bad("humaneval/test.jsonl", "prompt", "def g():\n", "x = 1\n", "def f(:\n", "def f():\n    pass\nclass A:\n", 1),
    *_bad("humaneval/test.jsonl", "test", "def check(f:", "assert True", "", 1),
    *_bad("humaneval/test.jsonl", "entry_point", "g", "f()", "", None),
]


@pytest.mark.parametrize(("name", "field", "value"), BAD_VALUES)
def test_a_field_that_holds_what_it_may_not_is_refused(data: Path, name: str, field: str, value: object) -> None:
    good = json.dumps(ROWS[name])
    _write(data / name, f"{good}\n{json.dumps(ROWS[name] | {field: value})}\n{good}\n")
    with pytest.raises(DataError) as caught:
        validate_data(data, NINE)
    message = str(caught.value)
    named = "prompt" if field == "entry_point" and value and value != 1 else field
    assert message.startswith(f"{data / name}, line 2: field '{named}' is ") and ", allowed: " in message
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    ("first", "second", "field"),
    [
        ({"more": 1}, {"more": "1"}, "more"),
        ({"more": None}, {"more": True}, None),
        ({"more": 1}, {"more": 1.5}, None),
        ({"more": [1]}, {"more": [1, "a"]}, "more.[]"),
        ({"more": {"a": 1}}, {"more": {"a": []}}, "more.a"),
        ({"more": {"a": 1}}, {"other": {"a": []}}, None),
        ({"more": True}, {"more": 0}, "more"),
        ({"": []}, {"": {}}, ""),
        ({"a.b": 1}, {"a": {"b": "1"}}, None),
    ],
)
def test_a_field_has_one_kind_of_values(data: Path, first: dict, second: dict, field: str | None) -> None:
    """Even one that no task reads: the reader of the files refuses a mixture, in the middle of a run."""
    row = ROWS["piqa/validation.jsonl"]
    _write(data / "piqa/validation.jsonl", json.dumps(row | first) + "\n" + json.dumps(row | second) + "\n")
    if field is None:
        validate_data(data, ["piqa"])
        return
    with pytest.raises(
        DataError, match=rf"line 2: field '{re.escape(field)}' is .*, allowed: .*as in the lines before"
    ):
        validate_data(data, ["piqa"])


@pytest.mark.parametrize("line", ['{"goal": NaN}', '{"goal": "g", "goal": "g"}', '{"goal": "\\ud800"}', '{"n": 1e999}'])
def test_what_json_readers_differ_on_is_refused(data: Path, line: str) -> None:
    """All of these: tests/calibration/test_json_lines.py."""
    row = json.dumps(ROWS["piqa/validation.jsonl"])
    _write(data / "piqa/validation.jsonl", f"{row}\n{line[:-1]}, {row[1:]}\n")
    with pytest.raises(DataError, match=r"validation\.jsonl, line 2: "):
        validate_data(data, ["piqa"])


def test_a_pipe_is_refused(data: Path) -> None:
    for name, task in (("piqa/validation.jsonl", "piqa"), ("hellaswag/validation.jsonl.gz", "hellaswag")):
        (data / name).unlink()
        os.mkfifo(data / name)
        with pytest.raises(DataError, match="cannot be read: it is a pipe, allowed: a regular file"):
            validate_data(data, [task])


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-8] + bytes(8),  # checksum
        lambda whole: b'{"not": "compressed"}\n',
    ],
    ids=["truncated", "checksum", "plain text"],
)
def test_a_damaged_gzip_file_is_refused(data: Path, damage: Callable[[bytes], bytes]) -> None:
    path = data / "hellaswag/validation.jsonl.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="damaged gzip file") as caught:
        validate_data(data, ["hellaswag"])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["squad", "", "PIQA", "testbed_facts"])
def test_an_unknown_task_is_refused(data: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"no local layout for task '{name}'.*piqa"):
        validate_data(data, ["piqa", name])


def test_the_digest_is_of_content_not_of_location(data: Path, tmp_path: Path) -> None:
    digest = validate_data(data, NINE)
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(data, moved)
    assert validate_data(moved, reversed(NINE)) == digest


def test_empty_lines_at_the_end_are_no_items(data: Path) -> None:
    digest = validate_data(data, ["piqa"])
    path = data / "piqa/validation.jsonl"
    content = path.read_bytes()
    path.write_bytes(content + b"\n  \n")
    assert validate_data(data, ["piqa"]) == digest
    path.write_bytes(b"\n" + content)
    with pytest.raises(DataError, match=r"line 1: not valid JSON \(it is empty\)"):
        validate_data(data, ["piqa"])


@pytest.mark.parametrize("name", ROWS)
def test_the_digest_changes_with_every_file(data: Path, name: str) -> None:
    digest = validate_data(data, NINE)
    _write(data / name, json.dumps(ROWS[name]) + "\n")
    assert validate_data(data, NINE) != digest


def test_the_digest_of_a_gzip_file_is_of_what_it_holds(data: Path) -> None:
    digest = validate_data(data, ["hellaswag"])
    path = data / "hellaswag/validation.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1, mtime=12345))
    assert validate_data(data, ["hellaswag"]) == digest


def test_subjects_are_those_that_have_files(data: Path, tmp_path: Path) -> None:
    write_tasks(data, ["mmlu", "ceval-valid"], tmp_path)
    index = TaskManager(include_path=str(tmp_path), include_defaults=False).task_index
    assert index["mmlu"].cfg["task"] == ["mmlu_anatomy", "mmlu_virology"]
    assert index["ceval-valid"].cfg["task"] == ["ceval-valid_law"]


def test_a_subject_unknown_to_lm_eval_is_refused(data: Path, tmp_path: Path) -> None:
    for split in ("dev", "test"):
        shutil.copy(data / f"mmlu/{split}/anatomy.jsonl", data / f"mmlu/{split}/alchemy.jsonl")
    with pytest.raises(DataError, match="alchemy"):
        write_tasks(data, ["mmlu"], tmp_path)


def test_benchmark_data_are_accepted(benchmark_data: Path) -> None:
    validate_data(benchmark_data, NINE)


def test_benchmark_tasks_are_the_stock_ones(benchmark_data: Path, tmp_path: Path) -> None:
    write_tasks(benchmark_data, NINE, tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert set(NINE) <= set(manager.all_tasks)
    assert manager.all_groups == ["ceval-valid", "mmlu"]
    for name, path in NINE.items():
        stock = load_yaml(STOCK / path, resolve_func=False)
        assert float(manager.task_index[name].cfg["metadata"]["version"]) == float(stock["metadata"]["version"])


#: What offline tasks may change; humaneval's metric and filter run programs elsewhere, under the same names.
_OWN = {"include", "dataset_path", "dataset_name", "dataset_kwargs"}


def _members(manager: TaskManager) -> dict[str, Path]:
    """Return every leaf task and lm-eval's own file for it."""
    leaves = {name: STOCK / path for name, path in NINE.items() if name not in manager.all_groups}
    subjects = (STOCK / "mmlu/default").glob("mmlu_*.yaml"), (STOCK / "ceval").glob("ceval-valid_*.yaml")
    return leaves | {path.stem: path for paths in subjects for path in paths}


def test_benchmark_tasks_change_only_where_data_come_from(benchmark_data: Path, tmp_path: Path) -> None:
    write_tasks(benchmark_data, NINE, tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    members = _members(manager)
    assert len(members) == 7 + 57 + 52
    assert set(manager.all_subtasks) == set(members)
    for name, path in members.items():
        stock, ours = load_yaml(path, resolve_func=False), dict(manager.task_index[name].cfg)
        files = ours["dataset_kwargs"]["data_files"]
        assert all(Path(file).is_file() for file in files.values())
        changed = {key for key in stock.keys() | ours.keys() if stock.get(key) != ours.get(key)} - _OWN
        switched_off = {key for key in changed if ours.get(key) is None and key.endswith("_split")}
        assert {stock[key] for key in switched_off}.isdisjoint(files)
        assert changed - switched_off == ({"metric_list", "filter_list"} if name == "humaneval" else set()), name
        splits = {ours[key] for key in ours if key.endswith("_split") and ours[key] is not None}
        assert splits <= set(files), name


def test_groups_average_as_the_stock_ones(benchmark_data: Path, tmp_path: Path) -> None:
    write_tasks(benchmark_data, ["mmlu", "ceval-valid"], tmp_path)
    index = TaskManager(include_path=str(tmp_path), include_defaults=False).task_index
    stock_ceval = load_yaml(STOCK / NINE["ceval-valid"], resolve_func=False)
    assert set(index["ceval-valid"].cfg["task"]) == set(stock_ceval["task"])
    for name in ("mmlu", "ceval-valid"):
        stock = load_yaml(STOCK / NINE[name], resolve_func=False)["aggregate_metric_list"]
        wanted = [{"aggregation": "mean", **metric} for metric in stock]
        assert index[name].cfg["aggregate_metric_list"] == wanted


def test_humaneval_differs_from_the_stock_task_in_two_functions_only() -> None:
    def plain(path: Path) -> dict[str, Any]:
        config = load_yaml(path, resolve_func=False)
        for part, key in ((config["metric_list"][0], "metric"), (config["filter_list"][0]["filter"][0], "filter_fn")):
            part[key] = part[key].rpartition(".")[2]
        return config

    assert plain(TASK_FOLDER / "humaneval/humaneval.yaml") == plain(STOCK / NINE["humaneval"])
