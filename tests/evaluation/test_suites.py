"""The tasks of a run are loaded before anything is computed: no hub, unknown names, fewer items than processes."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from starquant.config.tasks import TasksSpec
from starquant.errors import ConfigError, DataError, StarquantError
from starquant.evaluation import suites
from starquant.evaluation.offline import validate_data
from starquant.evaluation.suites import digest_of_documents
from starquant.runs.execute import execute
from starquant.session.processes import Processes
from starquant.session.session import Session
from tests.support.specs import spec


def suite(*names: str, **settings: object) -> TasksSpec:
    return TasksSpec(name="test", names=names, **settings)


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    """Three items in the offline layout."""
    (tmp_path / "data" / "piqa").mkdir(parents=True)
    lines = [json.dumps({"goal": f"g{n}", "sol1": "a", "sol2": "b", "label": n % 2}) for n in range(3)]
    (tmp_path / "data" / "piqa" / "validation.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


@pytest.mark.parametrize(("limit", "processes", "count"), [(1, 2, 1), (7, 8, 7), (None, 513, 512)])
def test_more_processes_than_items_are_refused(limit: int | None, processes: int, count: int) -> None:
    tasks = suite("testbed_facts", limit=limit)
    suites.validate_tasks(tasks, count)
    message = rf"^tasks\.limit: testbed_facts has {count} items to share, got {processes} processes; allowed: at most"
    with pytest.raises(ConfigError, match=message):
        suites.validate_tasks(tasks, processes)


def test_items_of_local_files_are_counted(piqa: Path) -> None:
    tasks = suite("piqa", data_dir=str(piqa))
    suites.validate_tasks(tasks, 3)
    with pytest.raises(ConfigError, match=r"^tasks\.limit: piqa has 3 items to share, got 4 processes"):
        suites.validate_tasks(tasks, 4)


def test_a_file_exchanged_within_its_time_stamp_is_read_anew(piqa: Path) -> None:
    """datasets keeps what it has read under path and time;"""
    path = piqa / "piqa" / "validation.jsonl"
    for goal in ("old", "new"):
        path.write_text(path.read_text().replace("old", goal).replace("g0", goal))
        os.utime(path, ns=(10**18, 10**18))
        tasks = suite("piqa", data_dir=str(piqa), data_fingerprint=validate_data(piqa, ["piqa"]))
        with suites.task_manager(tasks) as manager:
            (task,) = manager.load(["piqa"])["tasks"].values()
            assert [doc["goal"] for doc in task.eval_docs] == [goal, "g1", "g2"]


def test_files_exchanged_after_their_digest_was_taken_are_refused(piqa: Path) -> None:
    tasks = suite("piqa", data_dir=str(piqa), data_fingerprint=validate_data(piqa, ["piqa"]))
    path = piqa / "piqa" / "validation.jsonl"
    path.write_text(path.read_text().replace("g0", "g9"))
    with pytest.raises(DataError, match=rf"^tasks\.data_dir: {piqa}: its files have changed since the run began"):
        suites.validate_tasks(tasks)


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach 'x'\nmore"), OSError(30, "Read-only"), ValueError()])
def test_items_that_cannot_be_read_are_one_line(error: Exception, piqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise error

    monkeypatch.setattr(suites.TaskManager, "load", unreachable)
    with pytest.raises(DataError, match=r"^tasks\.names: the items of piqa cannot be read \(") as caught:
        suites.validate_tasks(suite("piqa", data_dir=str(piqa)))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(type(error)):  # of the package's own tasks it is a bug
        suites.validate_tasks(suite("testbed_facts"))


def test_a_run_is_judged_before_it_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither is full precision scored nor anything calibrated for tasks that cannot be shared."""
    run = spec("method=gptq", "tasks.names=[testbed_facts]", "tasks.limit=2", f"paths.results={tmp_path}")
    session = Session(processes=_Alone(0, 3))
    with pytest.raises(StarquantError, match=r"^tasks\.limit: testbed_facts has 2 items to share, got 3 processes"):
        execute(run, session)
    assert not list(tmp_path.glob("records/*.json")) and not list(tmp_path.glob("artifacts/*"))
    assert session.memory.tasks == {}


class _Alone(Processes):
    """The first of several processes, the others of which are not there."""

    def by_first(self, work, *args, **kwargs):  # type: ignore[no-untyped-def, override]
        return work(*args, **kwargs)


def test_a_suite_is_judged_once_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    from starquant.runs.evaluate import validate_tasks

    judged: list[TasksSpec] = []
    monkeypatch.setattr(suites, "validate_tasks", lambda tasks, *_: judged.append(tasks))
    session = Session()
    for words in ((), ("seed=1",), ("tasks.limit=3",), ("tasks.limit=3", "bits=w8a8")):
        validate_tasks(spec(*words), session)
    assert [tasks.limit for tasks in judged] == [None, 3]


class _Task:
    """What is read of a task of lm-eval."""

    def __init__(self, docs: list[dict[str, object]], examples: list[dict[str, object]], shots: int | None = 1) -> None:
        self.eval_docs, self.examples, self.config = docs, examples, SimpleNamespace(num_fewshot=shots)

    def fewshot_docs(self) -> list[dict[str, object]]:
        return self.examples


def test_the_digest_of_documents_is_of_all_that_is_read() -> None:
    docs, examples = [{"q": "a", "n": 1}, {"q": "b", "n": 2}], [{"q": "c"}]
    digest = digest_of_documents(_Task(docs, examples), 2)
    assert digest == digest_of_documents(_Task([{"n": 1, "q": "a"}, docs[1], {"q": "unread"}], examples), 2)
    without = digest_of_documents(_Task(docs, examples), 2, shots=0)
    assert without == digest_of_documents(_Task(docs, [{"q": "other"}], shots=0), 2)
    others = [_Task(docs[::-1], examples), _Task([*docs, docs[0]], examples), _Task(docs, [{"q": "d"}])]
    others += [_Task([docs[0], {"q": "b", "n": 2.5}], examples), _Task([*docs, {"q": "c"}], [])]
    assert len({digest, without, *(digest_of_documents(task, len(task.eval_docs)) for task in others)}) == 7


def test_documents_of_a_hub_are_told_and_those_of_the_package_and_of_files_are_not(
    piqa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        suites.validate_tasks(suite("testbed_facts")) == suites.validate_tasks(suite("piqa", data_dir=str(piqa))) == {}
    )
    read: list[tuple[int, int | None]] = []
    monkeypatch.setattr(suites, "is_of_hub", lambda tasks: True)
    monkeypatch.setattr(suites, "digest_of_documents", lambda task, *how: read.append(how) or "digest")
    tasks = suite("testbed_facts", limit=3)
    assert suites.validate_tasks(tasks, 1, {"testbed_facts": 2}) == {"testbed_facts": "digest"}
    assert read == [(3, 2)]


def test_a_record_of_other_documents_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a hub: nothing but these digests tells."""
    caplog.set_level(logging.INFO)
    documents = {"testbed_facts": "one"}
    real = suites.validate_tasks
    monkeypatch.setattr(suites, "validate_tasks", lambda *args: real(*args) | documents)
    words = ("method=none", "tasks.names=[testbed_facts]", "tasks.limit=2", f"paths.results={tmp_path}")
    first = execute(spec(*words))
    assert first.record.provenance["documents"] == documents
    assert execute(spec(*words)).reused
    documents["testbed_facts"] = "other"
    assert execute(spec(*words, "reuse=any")).reused
    again = execute(spec(*words))
    assert not again.reused and again.record.provenance["documents"] == documents
    assert f"{again.path} is of other items of testbed_facts" in caplog.text

    def unreachable(*_: object) -> None:
        raise DataError("no hub")

    monkeypatch.setattr(suites, "validate_tasks", unreachable)
    assert execute(spec(*words)).reused
    assert "whether the items of" in caplog.text and "cannot be told (no hub)" in caplog.text
