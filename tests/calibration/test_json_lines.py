"""Files that are refused before anything runs: by kind, encoding, line by line; and files that are read in pieces."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from starquant.calibration import cutting, json_lines
from starquant.calibration.cutting import consecutive, segments_of_file
from starquant.calibration.datasets import rows, shuffled, text_field
from starquant.calibration.json_lines import lines, parse_object, pieces, validate_text
from starquant.config.calibration import SourceSpec
from starquant.errors import DataError

#: Lines that readers of JSON differ on, or that are none, and what is said of them.
BAD_LINES = [
    (b'{"a": NaN}', "holds NaN, which is no number"),
    (b'{"a": [-Infinity]}', "holds -Infinity, which is no number"),
    (b'{"a": 1e999}', "holds 1e999, which is beyond a 64-bit number"),
    (b'{"a": 9223372036854775808}', "holds 9223372036854775808, which is beyond"),
    (b'{"a": ' + b"9" * 5000 + b"}", "holds 99.*, which is beyond a 64-bit number"),
    (b'{"a": 1, "a": 2}', "field 'a' stands twice"),
    (b'{"a": {"b": 1, "b": 1}}', "field 'b' stands twice"),
    (b'{"a": "\\ud800"}', "holds a lone surrogate"),
    (b'{"\\udfff": "a"}', "holds a lone surrogate"),
    (b'{"a": ["x", {"b": "\\ud83d"}]}', "holds a lone surrogate"),
    (b'{"a": "\xff"}', "not UTF-8"),
    ('{"a": "é"}'.encode("latin-1"), "not UTF-8"),
    ('{"a": "x"}'.encode("utf-16"), "not UTF-8 .UTF-16."),
    (b'\xef\xbb\xbf{"a": "x"}', "not UTF-8 .UTF-8 with a mark., allowed: UTF-8 without a mark"),
    (b"[" * 100_000, "nested too deeply|not valid JSON"),
    (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested more than 64 deep"),
    (b'{"a": 1} {"a": 2}', "not valid JSON"),
    (b"{'a': 1}", "not valid JSON"),
    (b'{"a": 1,}', "not valid JSON"),
    (b'{"a": "\x00"}', "not valid JSON"),
    (b"", "not valid JSON .it is empty."),
    (b" \r\n", "not valid JSON .it is empty."),
    (gzip.compress(b'{"a": 1}', mtime=0), "not UTF-8 .gzip."),
    (b'{"a": 1\n', "not valid JSON .*, character 9"),
    (b'{"k0": 0, ' + b", ".join(b'"k%d": 0' % i for i in range(50_000)) + b"}", "field 'k0' stands twice"),
    (b"{" + b", ".join(b'"k%d": 0' % i for i in range(50_000)) + b', "k49999": 0}', "field 'k49999' stands twice"),
    (b'"a"', "expected a JSON object, got str"),
    (b"1", "expected a JSON object, got int"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_refused(line: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"^there: ({message})") as caught:
        parse_object(line, "there")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_good_line_is_what_json_makes_of_it() -> None:
    item = {"a": [1, -(2**63), 2**63 - 1, 1.5, 1e300, True, None], "ü": "é\U0001f600", "b": {"c": [[]]}}
    for ascii_only in (True, False):
        assert parse_object(json.dumps(item, ensure_ascii=ascii_only).encode() + b"\r\n", "") == item


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    pipe, folder, device = tmp_path / "pipe.txt", tmp_path / "folder.txt", tmp_path / "device.txt"
    os.mkfifo(pipe)
    folder.mkdir()
    device.symlink_to("/dev/zero")
    for path, kind in ((pipe, "a pipe"), (folder, "a folder"), (device, "a device")):
        for read in (pieces, lines):
            with pytest.raises(DataError, match=f"^there: cannot be read: it is {kind}, allowed: a regular file"):
                next(iter(read(path, "there")))
    with pytest.raises(DataError, match=r"^there: no such file"):
        next(pieces(tmp_path / "none", "there"))
    with pytest.raises(DataError, match=r"^there: cannot be read"):
        next(pieces(tmp_path / "a\0b", "there"))
    (tmp_path / "link.txt").symlink_to(tmp_path / "plain.txt")
    (tmp_path / "plain.txt").write_text("x")
    assert list(pieces(tmp_path / "link.txt", "there")) == [b"x"]


def test_lines_have_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MOST_BYTES", 1 << 10)
    (tmp_path / "long").write_bytes(b"x\n" + b"y" * 2000)
    with gzip.open(tmp_path / "bomb.gz", "wb") as stream:
        stream.write(b"z" * (1 << 20))
    for name, number in (("long", 2), ("bomb.gz", 1)):
        with pytest.raises(DataError, match=f"^there, line {number}: longer than"):
            list(lines(tmp_path / name, "there"))


@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
def test_text_is_judged_to_its_end(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "PIECE", piece)
    good, bad, cut = tmp_path / "good", tmp_path / "bad", tmp_path / "cut"
    good.write_text("é\n\U0001f600\nü")
    bad.write_bytes("é\nü\n".encode() + b"a\xffb\n")
    cut.write_bytes("a\nb\nü".encode()[:-1])
    assert validate_text(good, "there") == good.stat().st_size
    for path in (bad, cut):
        with pytest.raises(DataError, match=r"^there, line 3: not UTF-8"):
            validate_text(path, "there")


class Counting:
    """A tokenizer that remembers how long the texts were that it met."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self.lengths = tokenizer, list[int]()

    def __call__(self, text: str, **options: object) -> object:
        self.lengths.append(len(text))
        return self._tokenizer(text, **options)


@pytest.mark.parametrize("end", ["\n", " "])
def test_a_large_text_is_tokenized_in_pieces_until_there_is_enough(
    end: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "large.txt"
    path.write_text(end.join(str(number) for number in range(2_900_000)), encoding="utf-8")
    assert path.stat().st_size > 20 << 20
    counting = Counting(tiny_tokenizer)
    segments = segments_of_file(path, "there", counting, 64, 40, random.Random(0))  # type: ignore[arg-type]
    assert len(segments) >= 40 and {len(segment.ids) for segment in segments} == {64}
    assert max(counting.lengths) <= 2 * 8 * 4 * 64 and sum(counting.lengths) < 1 << 18
    again = segments_of_file(path, "there", tiny_tokenizer, 64, 40, random.Random(0))
    assert [s.ids for s in again] == [s.ids for s in segments]
    other = segments_of_file(path, "there", tiny_tokenizer, 64, 40, random.Random(1))
    assert {s.text for s in other}.isdisjoint({s.text for s in segments})


@pytest.mark.parametrize("end", ["\n", " ", "é"])
def test_the_pieces_are_the_whole_text(
    end: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pieces, one after the other: nothing twice, nothing lost, each from a beginning."""
    path = tmp_path / "text.txt"
    text = "".join(f"{number}ü\U0001f600{'é' * (number % 50)}{end}" for number in range(3000))
    path.write_text(text, encoding="utf-8")
    met: list[str] = []
    monkeypatch.setattr(cutting, "WHOLE", 1000)
    monkeypatch.setattr(cutting, "consecutive", lambda text, *_: met.append(text) or [])
    segments_of_file(path, "there", tiny_tokenizer, 16, 10**9, random.Random(0))
    met = [piece for piece in met if piece]
    assert len(met) > 100 and (end == "é" or all(piece.endswith(end) for piece in met))
    assert "".join(sorted(met, key=text.index)) == text


def test_a_small_text_is_cut_as_a_whole(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "small.txt"
    path.write_text(" ".join(map(str, range(500))))
    expected = consecutive(path.read_text(), tiny_tokenizer, 16)
    random.Random(3).shuffle(expected)
    assert segments_of_file(path, "there", tiny_tokenizer, 16, 2, random.Random(3)) == expected


def test_items_come_in_the_order_of_a_shuffled_list(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} ü"}) + "\n" for n in range(200)) + "\n\n", encoding="utf-8")
    spec = SourceSpec(kind="text", path=str(path), segments=4, length=8)
    expected = [item["text"] for _, item in rows(spec, None, "w")]
    assert len(expected) == 200
    random.Random(7).shuffle(expected)
    assert list(shuffled(spec, None, "w", random.Random(7), lambda _, item: item["text"])) == expected


def test_every_line_is_judged_before_the_first_is_used(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"text": "a"}\n' * 99 + '{"text": NaN}\n')
    spec = SourceSpec(kind="text", path=str(path), segments=1, length=8)
    with pytest.raises(DataError, match=r"^w\.path: .*items\.jsonl, line 100: holds NaN"):
        next(shuffled(spec, None, "w", random.Random(0), lambda _, item: item))


@pytest.mark.parametrize(
    "content", ["a b".encode("utf-16"), b"\xef\xbb\xbfa b", gzip.compress(b"a b")], ids=["utf-16", "mark", "gzip"]
)
def test_a_text_file_begins_with_text(content: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"^there, line 1: not UTF-8 .(UTF-16|UTF-8 with a mark|gzip)., allowed"):
        validate_text(path, "there")


def test_an_error_shows_the_beginning_of_a_long_value() -> None:
    with pytest.raises(DataError, match=r"^there: field 'text' is \[1, 1, .*, allowed: a text") as caught:
        text_field({"text": [1] * 100_000}, "text", "there")
    assert len(str(caught.value)) < 200
