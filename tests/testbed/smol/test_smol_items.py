"""Splits, shipped files, scoring and baselines of the real model's items."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from starquant.testbed.items import Split
from starquant.testbed.smol.tasks import baselines
from starquant.testbed.smol.tasks.items import COUNTS, FOLDER, TASKS, held_out, shipped, split_of, stream, write
from starquant.testbed.smol.tasks.scoring import first_line, is_right

FILES = [(task, split) for task in TASKS for split in COUNTS]


def test_the_shipped_files_are_what_the_generators_make(tmp_path: Path) -> None:
    write(tmp_path)
    assert {path.name for path in FOLDER.iterdir()} == {path.name for path in tmp_path.iterdir()}
    assert len(FILES) == len([*tmp_path.iterdir()])
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name


@pytest.mark.parametrize(("task", "split"), FILES)
def test_shipped_items_are_held_out_and_distinct(task: str, split: Split) -> None:
    rows = shipped(task, split)
    assert len({row["prompt"] for row in rows}) == len(rows) == COUNTS[split]
    for row in rows:
        digest = hashlib.sha256(row["prompt"].encode()).digest()
        assert digest[0] < 13
        assert (digest[1] < 128) is (split is Split.VALIDATION)
        assert row["task"] == task
        assert set(row) == {"task", "prompt", "answer"} | ({"entry_point", "cases"} if task == "programs" else set())


@pytest.mark.parametrize("task", TASKS)
def test_training_draws_nothing_that_is_held_out(task: str) -> None:
    items = stream(task, 0, 2_000, Split.TRAIN)
    assert not any(held_out(item.prompt) for item in items)
    assert len({item.prompt for item in items}) == 2_000


@pytest.mark.parametrize("task", TASKS)
def test_a_stream_is_its_seed(task: str) -> None:
    assert stream(task, 3, 20, Split.TRAIN) == stream(task, 3, 30, Split.TRAIN)[:20]
    assert stream(task, 3, 20, Split.TRAIN) != stream(task, 4, 20, Split.TRAIN)


def test_a_twentieth_is_held_out_half_of_it_for_validation() -> None:
    splits = [split_of(f"prompt {i}") for i in range(20_000)]
    assert 0.045 < 1 - splits.count(Split.TRAIN) / len(splits) < 0.056
    assert 0.4 < splits.count(Split.VALIDATION) / (len(splits) - splits.count(Split.TRAIN)) < 0.6


def test_more_items_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starquant.testbed.smol.tasks.items.MOST_MISSES", 10)
    with pytest.raises(ValueError, match=r"sums has only about \d+ items of split 'test', not 50"):
        stream("sums", 0, 50, Split.TEST)


@pytest.mark.parametrize(("task", "split"), FILES)
def test_answers_are_right_and_those_of_other_items_wrong(task: str, split: Split) -> None:
    rows = shipped(task, split)[:60]
    assert all(is_right(row, row["answer"]) for row in rows)
    right = [is_right(row, other["answer"]) for row in rows for other in rows[:10] if row is not other]
    assert sum(right) < 0.05 * len(right)


@pytest.mark.parametrize(
    ("task", "answer", "text", "right"),
    [
        ("sums", " 1+2=3. The answer is 3.", "The answer is 3", True),
        ("sums", " 1+2=3. The answer is 3.", " The answer is 4. The answer is 3.\nQuestion", True),
        ("sums", " 1+2=3. The answer is 3.", " The answer is 3. The answer is 4.", False),
        ("sums", " 1+2=3. The answer is 3.", " 1+2=3.", False),
        ("sums", " 1+2=3. The answer is 3.", " The answer is 3.5.", False),
        ("sums", " 1+2=3. The answer is 3.", " The answer is 3,000.", False),
        ("sums", " 1+2=3. The answer is 3.", " The answer is -3.", False),
        ("lists", " bird, oak", "bird, oak  \nQuestion: more", True),
        ("lists", " bird, oak", "\n bird, oak", True),
        ("lists", " bird, oak", " bird, oak, key", False),
        ("reading", " Anna, Paris", " anna, Paris", False),
        ("reading", " Anna, Paris", "", False),
    ],
)
def test_scoring(task: str, answer: str, text: str, right: bool) -> None:
    assert is_right({"task": task, "prompt": "", "answer": answer}, text) is right


def test_any_program_that_returns_the_same_is_right() -> None:
    row = {"task": "programs", "prompt": "def f(x):\n", "entry_point": "f", "cases": [[1, 2], [5, 10]]}
    for body, right in (("return 2 * x", True), ("y = x\n    return y + x", True), ("return 2", False), ("2 x", False)):
        assert is_right(row, f"    {body}\n") is right
    assert not is_right(row, "return 2 * x")  # not indented: no body


def test_first_line() -> None:
    assert [first_line(text) for text in ("", " \n", " a b \n c", "\n\n a")] == ["", "", "a b", "a"]


def test_baselines_read_prompts_aright() -> None:
    for row in shipped("reading", Split.TEST):
        assert row["answer"].strip() in {", ".join(facts) for facts in baselines._facts(row["prompt"])}
    row = {"task": "lists", "prompt": "Question: Which of these words begin with the letter d: road, den?\nAnswer:"}
    assert baselines.copied(row) == "road, den"
    row = {"task": "sums", "prompt": "Question: Anna has 3 eggs. Anna loses 2 of them. How many?\nAnswer:"}
    assert baselines.copied(row) == "The answer is 2."
    assert baselines.copied({"task": "programs", "prompt": "def f(xs):\n"}) == "    return xs\n"


def test_guessing_and_copying_do_not_solve_the_tasks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["baselines"])
    monkeypatch.setattr(baselines, "GUESSES", 2)
    baselines.main()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == list(TASKS)
    for task, guessed, copied, _ in lines:
        assert max(float(guessed), float(copied)) < (50 if task == "reading" else 15)
