"""Packed rows hold whole segments, in the shares that were asked for, and held-out text never."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from starquant.errors import ConfigError, DataError
from starquant.testbed.items import Split
from starquant.testbed.smol.training import documents, packing
from starquant.testbed.smol.training.packing import LENGTH, SHARES, Mark, Rows, Segment, Source
from tests.support.smol import BOS, EOS, MASK, bytes_tokenizer, stream, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return documents.read_documents(write_text(tmp_path_factory.mktemp("text") / "folder"))


def source(text: list[str], split: Split = Split.TRAIN, seed: int = 0) -> Source:
    tokenizer = bytes_tokenizer()
    return Source(tokenizer, stream, SHARES, split, seed, documents.encode_documents(tokenizer, text, split))


def segments_of(rows: Rows) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids and marks of every segment, read back with a loop."""
    segments = []
    for ids, numbers, places, marks in zip(
        *(x.tolist() for x in (rows.ids_BL, rows.segment_BL, rows.position_BL, rows.mark_BL)), strict=True
    ):
        assert [number for number, before in zip(numbers, [0, *numbers], strict=False) if number != before] in (
            [*range(1, max(numbers) + 1)],
            [*range(1, max(numbers) + 1), 0],
        )  # each in one piece, and padding behind them
        for number in range(1, max(numbers) + 1):
            where = [i for i in range(LENGTH) if numbers[i] == number]
            assert [places[i] for i in where] == list(range(len(where)))
            segments.append((tuple(ids[i] for i in where), tuple(marks[i] for i in where)))
        padding = numbers.index(0) if 0 in numbers else LENGTH
        assert not any(ids[padding:]) and not any(places[padding:]) and not any(marks[padding:])
    return segments


def drawn_segments(count: int, seed: int = 0) -> list[Segment]:
    rng = random.Random(seed)
    segments = []
    for number in range(count):
        size = rng.choice((12, 30, 77, 150, 256))
        ids = [number, *(rng.randrange(200) for _ in range(size - 1))]
        start = rng.randrange(1, size - 4)
        segments.append(Segment(ids, (start, start + 3) if number % 2 else None))
    return segments


def test_rows_hold_whole_segments() -> None:
    segments = drawn_segments(200)
    rows = packing.pack(segments, 200)
    want = Counter()
    for one in segments:
        marks = [Mark.TEXT] * len(one.ids)
        if one.answer is not None:
            start, end = one.answer
            marks = [Mark.TEXT] * start + [Mark.ANSWER] * (end - start) + [Mark.END] * (len(one.ids) - end)
        want[tuple(one.ids), tuple(marks)] += 1
    assert Counter(segments_of(rows)) == want
    assert int((rows.segment_BL[:, 0] > 0).sum()) < 130  # of 105 that their tokens fill


def test_what_finds_no_row_is_left_out() -> None:
    segments = drawn_segments(200)
    rows = packing.pack(segments, 20)
    assert rows.ids_BL.shape == (20, LENGTH)
    assert (rows.segment_BL > 0).float().mean() > 0.97
    assert {ids for ids, _ in segments_of(rows)} < {tuple(one.ids) for one in segments}


def test_numbers_of_segments_fit() -> None:
    rows = packing.pack([Segment([7] * documents.SHORTEST)] * 50, 3)
    assert int(rows.segment_BL.max()) == packing.MOST_SEGMENTS


def test_an_answer_is_filled_with_end_tokens() -> None:
    segment = packing.task_segment([10, 11], [20, 21, 22], 6, bos=True)
    assert segment == Segment([BOS, 10, 11, 20, 21, 22, EOS, EOS, EOS], (3, 7))
    assert packing.task_segment([10], [20] * 9, 4, bos=False) == Segment([10, *[20] * 9, EOS], (1, 11))
    assert packing.task_segment([10] * 200, [20], 56, bos=False) is not None
    assert packing.task_segment([10] * 200, [20], 56, bos=True) is None


def test_rows_follow_from_seed_and_number(text: list[str]) -> None:
    one = source(text).rows(3, 8)
    for name in ("ids_BL", "segment_BL", "position_BL", "mark_BL"):
        assert torch.equal(getattr(one, name), getattr(source(text).rows(3, 8), name))
    assert not torch.equal(one.ids_BL, source(text).rows(4, 8).ids_BL)
    assert not torch.equal(one.ids_BL, source(text, seed=1).rows(3, 8).ids_BL)


def test_batches_are_the_same_from_any_step_on_and_from_other_processes(text: list[str]) -> None:
    whole = [rows.ids_BL for rows in packing.batches(source(text), 3, range(8), shard_rows=10)]
    assert [rows.shape for rows in whole] == [(3, LENGTH)] * 8
    assert len({ids.numpy().tobytes() for ids in whole}) == 8
    later = [rows.ids_BL for rows in packing.batches(source(text), 3, range(4, 8), shard_rows=10)]
    apart = [rows.ids_BL for rows in packing.batches(source(text), 3, range(4, 8), workers=1, shard_rows=10)]
    assert len(later) == len(apart) == 4
    assert all(torch.equal(a, b) for got in (later, apart) for a, b in zip(got, whole[4:], strict=True))
    assert list(packing.batches(source(text), 3, range(8, 8))) == []


def test_sources_have_their_shares(text: list[str]) -> None:
    tokenizer, tokens = bytes_tokenizer(), Counter()
    for ids, _ in segments_of(source(text).rows(0, 300)):
        words = tokenizer.decode(list(ids))
        task = re.search("sums|programs|lists|reading", words)
        tokens[task[0] if task else "natural"] += len(ids)
        assert "validation" not in words
    shares = {name: count / tokens.total() for name, count in tokens.items()}
    assert shares == pytest.approx(SHARES, abs=0.03)


def test_held_out_text_is_in_no_training_row(text: list[str]) -> None:
    tokenizer = bytes_tokenizer()

    def numbers(split: Split) -> set[int]:
        segments = (part for shard in range(4) for part in segments_of(source(text, split).rows(shard, 64)))
        return {int(word) for ids, _ in segments for word in re.findall(r"<(\d{3})>", tokenizer.decode(list(ids)))}

    held_out = numbers(Split.VALIDATION)
    assert held_out == {0, 40}
    trained_on = numbers(Split.TRAIN)
    assert not trained_on & held_out
    assert len(trained_on) > 35


def test_what_reads_like_a_special_token_is_text() -> None:
    [ids] = documents.encode(bytes_tokenizer(), ["a <mask> b"])
    assert MASK not in ids
    assert len(ids) == len("a <mask> b")


def test_pieces_come_from_all_of_a_text() -> None:
    tokenizer = bytes_tokenizer()
    text = documents.encode_documents(tokenizer, ["held out " * 9, "a" * 20, "short", "bcdefghijk" * 30], Split.TRAIN)
    assert text.starts == [0, 20, 320]
    rng = random.Random(0)
    pieces = [tokenizer.decode(text.piece(rng, 48)) for _ in range(1000)]
    assert {len(piece) for piece in pieces} == {20, 48}
    assert sum(piece == "a" * 20 for piece in pieces) == pytest.approx(1000 * 20 / 320, abs=30)
    assert len(set(pieces)) == 11


def test_shares_that_are_named_are_taken_and_the_others_scaled() -> None:
    assert packing.shares_with({}) == pytest.approx(SHARES)
    shares = packing.shares_with({"sums": 0.5})
    assert shares["sums"] == 0.5
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["natural"] / shares["lists"] == pytest.approx(0.38 / 0.13)
    assert packing.shares_with({"natural": 0})["natural"] == 0
    assert packing.shares_with(dict(SHARES, natural=0.0, sums=0.62))["sums"] == 0.62


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sum": 0.5}, "--share sum: allowed: .*Did you mean 'sums'"),
        ({"sums": 1.5}, "--share sums=1.5: allowed: 0 to 1"),
        ({"sums": 0.7, "lists": 0.7}, "the shares sum to 1.4, allowed: 1"),
        (dict.fromkeys(SHARES, 0.1), "the shares sum to 0.5, allowed: 1"),
        ({"sums": float("nan")}, "--share sums=nan: allowed: 0 to 1"),
    ],
)
def test_other_shares_are_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        packing.shares_with(changed)


def test_documents_are_files_and_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("of a file\n\nand more")
    (tmp_path / "a").mkdir()
    lines = [json.dumps({"text": f"line\u2028{n}", "id": n}, ensure_ascii=False) for n in range(3)]
    (tmp_path / "a" / "some.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "a.md").write_text("is no text file")
    assert documents.read_documents(tmp_path) == ["line\u20280", "line\u20281", "line\u20282", "of a file\n\nand more"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", b'{"words": "a"}', r'a\.jsonl:1: has no string "text"'),
        ("a.txt", b"\xff\xfe", r"a\.txt: is not UTF-8"),
        ("a.txt", b"one", "has 1 documents, needs 2 or more"),
    ],
)
def test_a_folder_that_is_no_text_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents.read_documents(tmp_path)


def test_a_text_that_is_missing_or_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        documents.read_documents(tmp_path / "none")
    with pytest.raises(DataError, match="none of the 1 documents held out has 12 tokens"):
        documents.encode_documents(bytes_tokenizer(), ["a", "b" * 20], Split.VALIDATION)
