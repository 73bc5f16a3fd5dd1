"""Answers on disk: read back exactly, torn lines dropped, and a killed run that goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from torch import Tensor

from starquant.config.protocol import TaskProtocol
from starquant.config.samplers import LLaDASamplerSpec
from starquant.diffusion import MaskPredictor
from starquant.evaluation.lm import DiffusionLM
from starquant.evaluation.responses import ResponseLog

ANSWERS = {"a": -1.1, "b": "", "c": 1 / 3, "d": 'two\nlines, "quotes" and größe \u2028', "e": -math.inf, "f": 1e-300}


def _keys(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_answers_are_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "task.jsonl"
    log = ResponseLog(path)
    for key, answer in ANSWERS.items():
        assert key not in log
        log.add(key, answer)
    again = ResponseLog(path)
    for key, answer in ANSWERS.items():
        assert key in again
        assert again[key] == log[key] == answer
        assert type(again[key]) is type(answer)
    assert "g" not in again
    with pytest.raises(KeyError):
        again["g"]


def test_every_answer_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    log = ResponseLog(path)
    for count, (key, answer) in enumerate(ANSWERS.items(), 1):
        log.add(key, answer)
        assert len(path.read_bytes().split(b"\n")) == count + 1


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = ResponseLog(None)
    log.add("a", 1.0)
    assert log["a"] == 1.0
    assert list(tmp_path.iterdir()) == []
    assert "a" not in ResponseLog(None)


def test_a_line_torn_anywhere_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    log = ResponseLog(path)
    log.add("a", 1.5)
    log.add("b", "text")
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        torn = ResponseLog(path)
        assert ("a" in torn) == (end >= first)
        assert "b" not in torn
        torn.add("b", "text")
        torn.add("a", 1.5)
        again = ResponseLog(path)  # what was added after the torn line is whole
        assert again["a"] == 1.5
        assert again["b"] == "text"


@pytest.mark.parametrize(
    "edit",
    [
        lambda line: line.replace(b"1.5", b"9.5"),
        lambda line: line.replace(b'"b"', b'"c"'),
        lambda line: b'{"key": "b", "answer": 1.5}\n',
        lambda line: b"no JSON\n",
        lambda line: b'["b", 1.5]\n',
        lambda line: b"\xff\xfe\n",
        lambda line: b"\n",
    ],
    ids=["answer", "key", "without a digest", "no JSON", "no object", "no text", "empty"],
)
def test_an_edited_line_is_set_aside_alone(edit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "task.jsonl"
    log = ResponseLog(path)
    for key, answer in {"a": 0.5, "b": 1.5, "d": 2.5}.items():
        log.add(key, answer)
    lines = path.read_bytes().splitlines(keepends=True)
    edited = edit(lines[1])
    path.write_bytes(lines[0] + edited + lines[2] + b'{"key": "torn')
    again = ResponseLog(path)
    assert (again["a"], again["d"]) == (0.5, 2.5)
    assert "b" not in again and "c" not in again
    assert f"{path}: not what was written in line 2; set aside in task.jsonl.damaged" in caplog.text
    assert path.read_bytes() == lines[0] + lines[2]
    assert (tmp_path / "task.jsonl.damaged").read_bytes() == edited
    again.add("b", 1.5)
    assert _keys(path) == ["a", "d", "b"]


def test_a_line_of_another_run_or_task_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "digest" / "code" / "task.jsonl"
    ResponseLog(path).add("a", 0.5)
    for other in ("digest/code/other.jsonl", "digest/edited/task.jsonl", "another/code/task.jsonl"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_bytes(path.read_bytes())
        assert "a" not in ResponseLog(tmp_path / other)
    assert "a" in ResponseLog(path)


def test_an_edited_line_of_another_process_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    ResponseLog(path, rank=1).add("b", 1.5)
    theirs = tmp_path / "task.rank1.jsonl"
    theirs.write_bytes(edited := theirs.read_bytes().replace(b"1.5", b"2.5"))
    assert "b" not in ResponseLog(path)
    assert theirs.read_bytes() == edited
    assert "b" not in ResponseLog(path, rank=1)
    assert theirs.read_bytes() == b""


def test_keys_tell_requests_apart() -> None:
    requests: list[tuple[str, Any]] = [
        ("loglikelihood", ["ab", "c"]),
        ("loglikelihood", ["a", "bc"]),
        ("loglikelihood", ["abc", ""]),
        ("loglikelihood", ["c", "ab"]),
        ("generate_until", ["ab", "c"]),
        ("generate_until", ["ab", ["c"]]),
        ("generate_until", ["ab", []]),
        ("generate_until", ["ab ", []]),
    ]
    assert len({ResponseLog.key(*request) for request in requests}) == len(requests)
    assert ResponseLog.key("loglikelihood", ["ab", "c"]) == ResponseLog.key("loglikelihood", ["ab", "c"])


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


class Mortal(MaskPredictor):
    """Counts rows, and dies at a given forward pass."""

    def __init__(self, model: Any, dies_at: int | None = None) -> None:
        super().__init__(model)
        self.passes, self.rows, self.dies_at = 0, 0, dies_at

    def chunks(self, ids_BL: Tensor, *args: Any, **kwargs: Any) -> Iterator[tuple[slice, Tensor]]:
        if self.passes == self.dies_at:
            raise Killed
        self.passes += 1
        self.rows += len(ids_BL)
        return super().chunks(ids_BL, *args, **kwargs)


SAMPLER = LLaDASamplerSpec(name="llada", gen_length=4, block_length=4, steps=4, temperature=0.7)
PEOPLE = "ada ben cara dan eva finn gina hugo iris jack kara leo".split()
ASKED = {
    "loglikelihood": [(f"describe {p} by city job pet :", " city oslo") for p in PEOPLE],  # 3 mask patterns each
    "generate_until": [(f"what is the city of {p} ?" + " ?" * (i % 3), {"until": []}) for i, p in enumerate(PEOPLE)],
}


def _run(tiny, tiny_tokenizer, kind: str, path: Path | None, dies_at: int | None = None) -> tuple[list[Any], Mortal]:
    protocol = TaskProtocol(mc_num=16) if kind == "loglikelihood" else TaskProtocol(sampler=SAMPLER)
    lm = DiffusionLM(tiny, tiny_tokenizer, protocol=protocol, batch_size=2)
    lm.predict = predict = Mortal(tiny, dies_at)
    lm.responses = ResponseLog(path)
    requests = [Instance(kind, {}, arguments, i) for i, arguments in enumerate(ASKED[kind])]
    return getattr(lm, kind)(requests), predict


@pytest.mark.parametrize("kind", ASKED)
def test_a_killed_run_goes_on(tiny, tiny_tokenizer, tmp_path: Path, kind: str) -> None:
    whole, predict = _run(tiny, tiny_tokenizer, kind, None)
    path = tmp_path / "answers.jsonl"
    with pytest.raises(Killed):
        _run(tiny, tiny_tokenizer, kind, path, dies_at=predict.passes // 2)
    done = _keys(path)
    assert 0 < len(done) < len(whole)
    with path.open("a") as stream:
        stream.write('{"key": "to')  # killed while writing, too
    resumed, second = _run(tiny, tiny_tokenizer, kind, path)
    assert resumed == whole
    keys = _keys(path)
    assert keys[: len(done)] == done
    assert len(keys) == len(set(keys)) == len(whole)
    rows_each = predict.rows / len(whole)
    assert second.rows == rows_each * (len(whole) - len(done))


@pytest.mark.parametrize("kind", ASKED)
def test_a_finished_run_asks_the_model_nothing(tiny, tiny_tokenizer, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "answers.jsonl"
    first, _ = _run(tiny, tiny_tokenizer, kind, path)
    content = path.read_bytes()
    second, predict = _run(tiny, tiny_tokenizer, kind, path, dies_at=0)
    assert second == first
    assert predict.passes == 0
    assert path.read_bytes() == content
