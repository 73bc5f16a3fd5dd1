"""Records are what was written and the means of their items, or they are not believed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starquant.errors import RecordError
from starquant.store.items import items_folder
from starquant.store.record import RunRecord
from starquant.store.records import RecordStore, read_record
from starquant.store.source import record_paths
from starquant.store.verification import validate_items
from tests.support.records import edit_record, fidelity_rows, items_of, make_record, of_items
from tests.support.specs import spec
from tests.support.tables import score

FACTS = "testbed_facts"
ITEMS = {FACTS: items_of([1.0, 0, 1, 1]), "fidelity": fidelity_rows([[0.1, 0.3], [0.6, 0.8]])}
RUN = spec()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A record of a task and of fidelity, with the standard error of the task's items."""
    record = make_record(RUN)
    record = record.model_copy(update={"scores": [*record.scores, score("fidelity", 0.0, "kl", "all", unit="nats")]})
    record = of_items(record, ITEMS)
    stderr = float(np.std([1.0, 0, 1, 1], ddof=1) / 2)
    scores = [record.scores[0].model_copy(update={"stderr": stderr}), record.scores[1]]
    return RecordStore(tmp_path).write(RUN, record.model_copy(update={"scores": scores}), ITEMS)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record as a text editor would."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def older(path: Path, version: int = 3) -> None:
    """Make a record one that has no seal."""
    rewrite(path, lambda data: (data.pop("seal"), data.update(schema_version=version)))


def judged(path: Path) -> RunRecord:
    record = read_record(path)
    validate_items(path, record, whole=True)
    return record


def test_what_was_written_is_believed_wherever_it_lies(path: Path, tmp_path: Path) -> None:
    assert RecordStore(tmp_path).find(RUN) == judged(path)
    rewrite(path, lambda data: None)  # another layout of the same content
    shutil.copytree(path.parent, tmp_path / "elsewhere")
    assert judged(tmp_path / "elsewhere" / path.name) == judged(path)


#: Each changes a single thing of a record.
EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "score": lambda data: data["scores"][0].update(value=0.9),
    "last digit": lambda data: data["scores"][1].update(value=data["scores"][1]["value"] + 1e-12),
    "stderr": lambda data: data["scores"][0].update(stderr=0.001),
    "interval": lambda data: data["scores"][1].update(ci_low=0.1, ci_high=0.2),
    "n": lambda data: data["scores"][0].update(n=5),
    "a score less": lambda data: data["scores"].pop(),
    "a score more": lambda data: data["scores"].append(data["scores"][0] | {"task": "gsm8k"}),
    "method": lambda data: data["spec"]["method"].update(name="star_quant"),
    "code": lambda data: data["provenance"].update(code_digest="0" * 16),
    "dirty": lambda data: data["provenance"].update(git_dirty=False, more=1),
    "manifest": lambda data: data["manifest"][0].update(weight_bits=2),
    "timings": lambda data: data["timings"]["seconds"].update(evaluate=0.5),
    "fit": lambda data: data["fit_report"].append({}),
    "no seal": lambda data: data.update(seal=None),
    "seal": lambda data: data["seal"]["items"].pop("columns.json"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_record_is_named_and_set_aside_with_its_items(
    path: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(path, edit)
    assert RecordStore(tmp_path).find(RUN, alone=False) is None and path.exists()  # may be in the making
    assert RecordStore(tmp_path).find(RUN) is None
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {path}: not what was written") and said.count("\n") == 1
    assert {one.name for one in path.parent.iterdir()} == {
        f"{path.name}.damaged",
        f"{items_folder(path).name}.damaged",
    }
    assert list(record_paths(tmp_path)) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("value", float("nan")), ("value", float("inf")), ("value", "NaN"), ("stderr", float("nan"))),
        *(("stderr", -0.01), ("ci_low", float("-inf")), ("n", 0), ("n", -4)),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_numbers_that_are_none_are_named(path: Path, field: str, value: object, sealed: bool) -> None:
    if not sealed:
        older(path)
    rewrite(path, lambda data: data["scores"][0].update({field: value}))
    with pytest.raises(RecordError) as caught:
        read_record(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    if not sealed:
        assert f": scores.0.{field}: got {value}".lower() in str(caught.value).lower()


def test_an_interval_that_ends_before_it_begins_and_negative_seconds_are_named(path: Path) -> None:
    older(path)
    rewrite(path, lambda data: data["scores"][1].update(ci_low=0.4, ci_high=0.3))
    with pytest.raises(RecordError, match=r"scores\.1\.ci_low: got 0\.4 .*, allowed: at most ci_high"):
        read_record(path)
    rewrite(path, lambda data: data["scores"][1].update(ci_high=0.5))
    rewrite(path, lambda data: data["timings"]["seconds"].update(evaluate=-1.0))
    with pytest.raises(RecordError, match=r"timings\.seconds\.evaluate: got -1\.0, allowed: 0 or more"):
        read_record(path)


@pytest.mark.parametrize("part", ["model", "bits", "method", "tasks"])
def test_a_specification_that_is_none_is_named(path: Path, part: str) -> None:
    older(path)
    rewrite(path, lambda data: data["spec"].pop(part))
    with pytest.raises(RecordError, match=rf"^{path}: spec\.{part}\.name: is missing"):
        read_record(path)


def test_a_pipe_is_no_record(path: Path, tmp_path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RecordError, match="no regular file"):
        read_record(path)
    assert RecordStore(tmp_path).find(RUN) is None and not path.exists()


def _drop(folder: Path) -> None:
    shutil.rmtree(folder)


def _replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def _pipe(folder: Path) -> None:
    (folder / "fidelity.jsonl").unlink()
    os.mkfifo(folder / "fidelity.jsonl")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"\.items: the items of the record are missing"),
        (
            lambda folder: [one.unlink() for one in folder.iterdir()],
            r"\.jsonl: is missing",
        ),
        (lambda folder: (folder / f"{FACTS}.jsonl").unlink(), r"testbed_facts\.jsonl: is missing"),
        (_replace(f"{FACTS}.jsonl", '"acc": 0', '"acc": 1'), r"testbed_facts\.jsonl: is not what was written"),
        (_replace("fidelity.jsonl", '"kl": 0.1', '"kl": 0.10'), r"fidelity\.jsonl: is not what was written"),
        (lambda folder: (folder / "gsm8k.jsonl").write_text("{}\n"), r"gsm8k\.jsonl: is not of the record's items"),
        (_pipe, r"fidelity\.jsonl: is missing"),
    ],
)
def test_items_that_are_not_what_was_written_are_named(
    path: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(items_folder(path))
    with pytest.raises(RecordError, match=message):
        judged(path)
    assert RecordStore(tmp_path).find(RUN) is None
    assert not path.exists() and not items_folder(path).exists()


def test_columns_are_made_again_of_the_items(path: Path) -> None:
    before = validate_items(path, read_record(path))
    (items_folder(path) / "columns.json").unlink()
    assert validate_items(path, read_record(path)) == before
    _replace(f"{FACTS}.jsonl", '"acc": 0', '"acc": 1')(items_folder(path))
    with pytest.raises(RecordError, match="is not what was written"):  # read for tables too, where there are no columns
        validate_items(path, read_record(path))


@pytest.mark.parametrize("other_order", [False, True])
@pytest.mark.parametrize("content", ["[\n", '{"schema_version": 1, "tasks": {}}\n'])
def test_damaged_columns_do_not_cost_a_record_whose_items_are_whole(
    path: Path, tmp_path: Path, content: str, other_order: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if other_order:  # than tasks are scored in
        record = read_record(path)
        path = RecordStore(tmp_path).write(RUN, record.model_copy(update={"seal": None}), dict(reversed(ITEMS.items())))
    columns, record = items_folder(path) / "columns.json", judged(path)
    numbers = validate_items(path, record)
    before = columns.read_bytes()
    columns.write_text(content)
    with pytest.raises(RecordError, match=r"columns\.json: is not what was written; delete it"):
        judged(path)  # tables move nothing
    assert RecordStore(tmp_path).find(RUN, alone=False) is None  # may be in the making
    assert RecordStore(tmp_path).find(RUN) == record
    warning = f"warning: {columns}: is not what was written; set aside as columns.json.damaged and computed again\n"
    assert capsys.readouterr().err == warning
    assert columns.read_bytes() == before and validate_items(path, judged(path)) == numbers
    assert columns.with_name("columns.json.damaged").read_text() == content
    assert RecordStore(tmp_path).find(RUN) == record and capsys.readouterr().err == ""


def test_columns_of_an_order_that_cannot_be_told_are_read_of_the_items(path: Path, tmp_path: Path) -> None:
    items = {"b": items_of([1.0, 0]), "a": items_of([0.0, 1]), "c": items_of([1.0, 1])}
    path = RecordStore(tmp_path).write(RUN, make_record(RUN).model_copy(update={"scores": []}), items)
    numbers = validate_items(path, read_record(path))
    (items_folder(path) / "columns.json").write_text("[")
    record = RecordStore(tmp_path).find(RUN)
    assert record is not None and validate_items(path, record) == numbers
    assert not (items_folder(path) / "columns.json").exists()


def test_damaged_columns_beside_damaged_items_are_set_aside_with_the_record(path: Path, tmp_path: Path) -> None:
    (items_folder(path) / "columns.json").write_text("[")
    _replace(f"{FACTS}.jsonl", '"acc": 0', '"acc": 1')(items_folder(path))
    assert RecordStore(tmp_path).find(RUN) is None
    assert {one.name for one in path.with_name(f"{items_folder(path).name}.damaged").iterdir()} == {
        *("columns.json", "fidelity.jsonl", f"{FACTS}.jsonl")
    }


#: What a forger who puts a new seal on, or an editor of a record without one, may not say of the items.
FORGED = {
    "value is 0.9, the mean of its items 0.75": (0, {"value": 0.9}),
    "stderr is 0.1, that of its items 0.25": (0, {"stderr": 0.1}),
    "n is 5, its items are 4": (0, {"n": 5}),
    "value is 0.1, the mean of its items 0.45": (1, {"value": 0.1}),
    "n is 3, its items are 2": (1, {"n": 3}),
}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("message", FORGED)
def test_scores_are_the_means_of_their_items(path: Path, message: str, sealed: bool) -> None:
    index, values = FORGED[message]
    edit_record(path, lambda data: data["scores"][index].update(values))
    if not sealed:
        older(path)
    with pytest.raises(RecordError, match=rf"^{path}: scores\.{index} \(.*\): {message}"):
        judged(path)


def test_a_group_is_the_mean_over_all_items_of_its_members(tmp_path: Path) -> None:
    items = {"mmlu_law": items_of([1.0, 1, 0]), "mmlu_math": items_of([0.0])}
    record = make_record(RUN)
    for value, right in ((0.5, True), (1 / 3, False)):  # of items; of members
        scores = [score("mmlu", value, n=4)]
        path = RecordStore(tmp_path).write(RUN, record.model_copy(update={"scores": scores}), items)
        if right:
            judged(path)
            continue
        with pytest.raises(RecordError, match=r"the mean of its items 0\.5"):
            judged(path)


def test_records_without_a_seal_stay_readable_with_and_without_items(path: Path) -> None:
    for version in (3, 2):
        rewrite(path, lambda data, version=version: (data.pop("seal", None), data.update(schema_version=version)))
        assert judged(path).seal is None
    shutil.rmtree(items_folder(path))
    assert judged(path).seal is None


def test_items_of_a_record_that_is_replaced_do_not_stay(path: Path, tmp_path: Path) -> None:
    again = RecordStore(tmp_path).write(
        RUN, of_items(make_record(RUN), {FACTS: items_of([1.0])}), {FACTS: items_of([1.0])}
    )
    assert again == path
    assert {one.name for one in items_folder(path).iterdir()} == {f"{FACTS}.jsonl", "columns.json"}
    judged(path)
