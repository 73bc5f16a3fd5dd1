"""Segments of real and generated text: what they hold, in which order, and every refusal."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from starquant.calibration.batches import Segment
from starquant.calibration.segments import fingerprint, prompts_of, read_segments, source_file
from starquant.calibration.shipped_text import testbed_items as generated_items
from starquant.config.calibration import SourceSpec
from starquant.errors import ConfigError, DataError
from starquant.testbed.items import Split, split_of
from starquant.testbed.smol import natural_text
from starquant.testbed.smol.tasks.items import split_of as split_of_prompt
from starquant.testbed.tiny import train

CONTEXT = 256


def source(kind: str, segments: int = 4, length: int = 32, **fields: object) -> SourceSpec:
    return SourceSpec(kind=kind, segments=segments, length=length, **fields)


def write_lines(path: Path, *items: object) -> Path:
    path.write_text("".join(f"{json.dumps(item)}\n" for item in items), encoding="utf-8")
    return path


def sentence(index: int = 0, **changes: object) -> dict[str, object]:
    item = {"sentence": f"ada {index} met ben because _ had tea", "option1": "ada", "option2": "ben", "answer": "2"}
    return item | changes


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE whose white space can merge across lines, so that splitting a text changes its tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    lines = ["the cat.\n\nThe dog has 12 eggs.\n\nQuestion: how many?\nAnswer: 3"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<e>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")


def test_a_source_is_found_where_it_is_named_then_in_the_data_folder(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    write_lines(folder / "train.jsonl", {"question": "q", "answer": "a"})
    assert source_file(source("gsm8k", path="mine.jsonl"), str(tmp_path)) == Path("mine.jsonl")
    assert source_file(source("gsm8k"), str(tmp_path)) == folder / "train.jsonl"
    assert source_file(source("gsm8k", split="test"), str(tmp_path)) is None
    assert source_file(source("winogrande"), str(tmp_path)) is None
    assert source_file(source("gsm8k"), None) is None
    assert source_file(source("testbed"), str(tmp_path)) is None


def test_winogrande_segments_are_the_joined_sentences(tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    items = [sentence(i, answer=str(1 + i % 2)) for i in range(60)]
    path = write_lines(tmp_path / "w.jsonl", *items)
    segments = read_segments(source("winogrande", path=str(path)), bytes_tokenizer, CONTEXT, seed=3)
    assert [len(s.ids) for s in segments] == [32] * 4 and {s.prompt_length for s in segments} == {0}
    text = bytes_tokenizer.decode([i for s in segments for i in s.ids])
    filled = [f"ada {i} met ben because {('ada', 'ben')[i % 2]} had tea" for i in range(60)]
    parts = text.split("\n\n")
    assert len(parts) > 2 and set(parts[:-1]) <= set(filled)
    assert any(f.startswith(parts[-1]) for f in filled)
    assert parts[:-1] != filled[: len(parts) - 1]  # shuffled
    # Consecutive and exact: the tokens are those of the whole text, tokenized at once.
    whole = bytes_tokenizer("\n\n".join([*parts[:-1], parts[-1]]), add_special_tokens=False)["input_ids"]
    assert whole[:100] == [i for s in segments for i in s.ids][:100]
    for segment in segments:  # the text for the overlap check holds whole sentences, the cut ones too
        assert set(segment.text.split("\n\n")) <= set(filled)
        assert bytes_tokenizer.decode(segment.ids).strip() in segment.text


def test_all_segments_of_winogrande_can_be_asked_for(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "w.jsonl", *[sentence(i) for i in range(10)])  # 8 words each
    read = read_segments(source("winogrande", 8, 10, path=str(path)), tiny_tokenizer, CONTEXT, seed=0)
    assert len({s.ids for s in read}) == 8
    with pytest.raises(DataError, match=r"fidelity\.source\.segments: got 9, .* has 8 segments"):
        read_segments(
            source("winogrande", 9, 10, path=str(path)), tiny_tokenizer, CONTEXT, seed=0, where="fidelity.source"
        )


def test_gsm8k_items_keep_their_prompt_and_are_cut(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    long = {"question": "x " * 30, "answer": "1"}  # "Question:" + 30 + "Answer:" = 32 tokens: no room
    fits = {"question": "x " * 29, "answer": "1 2 3"}
    short = {"question": "how many ?", "answer": "4 5"}
    path = write_lines(tmp_path / "g.jsonl", long, fits, short)
    read = read_segments(source("gsm8k", 2, path=str(path)), tiny_tokenizer, CONTEXT, seed=0)
    by_length = sorted(read, key=lambda s: s.prompt_length)

    def encode(text: str) -> list[int]:
        return tiny_tokenizer(text)["input_ids"]

    assert [(s.prompt_length, len(s.ids)) for s in by_length] == [(5, 7), (31, 32)]
    assert by_length[0].text == "Question: how many ?\nAnswer: 4 5"
    assert list(by_length[0].ids) == encode("Question: how many ?\nAnswer: 4 5")
    assert by_length[1].ids[-1:] == tuple(encode("1"))
    with pytest.raises(DataError, match=r"got 3, .* has 2 segments"):
        read_segments(source("gsm8k", 3, path=str(path)), tiny_tokenizer, CONTEXT, seed=0)


def test_text_file_is_cut_into_consecutive_segments(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "t.txt"
    path.write_text(" ".join(str(i) for i in range(50)), encoding="utf-8")
    spec = source("text", 4, 12, path=str(path))
    read = read_segments(spec, tiny_tokenizer, CONTEXT, seed=1)
    numbers = sorted([int(word) for word in s.text.split()] for s in read)
    assert numbers == [list(range(begin, begin + 12)) for begin in (0, 12, 24, 36)]
    assert all(list(s.ids) == tiny_tokenizer(s.text)["input_ids"] and s.prompt_length == 0 for s in read)
    orders = {tuple(s.ids for s in read_segments(spec, tiny_tokenizer, CONTEXT, seed=seed)) for seed in range(6)}
    assert len(orders) > 1
    with pytest.raises(DataError, match=r"got 4, but the source \(.*t\.txt\) has 3 segments"):
        read_segments(source("text", 4, 14, path=str(path)), tiny_tokenizer, CONTEXT, seed=1)


def test_jsonl_text_and_prompts(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "t.jsonl", {"text": "1 2 3 4 5 6\u20287"}, {"prompt": "how many ?", "answer": "8 9"})
    read = read_segments(source("text", 2, 4, path=str(path)), tiny_tokenizer, CONTEXT, seed=0)
    found = {(tiny_tokenizer.decode(s.ids), s.prompt_length) for s in read}
    assert found == {("1 2 3 4", 0), ("how many ? 8", 3)}


@pytest.mark.parametrize("split", list(Split))
def test_testbed_segments_are_of_their_split(split: Split, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    spec = source("testbed", 42, 64, split=split.value)
    segments = read_segments(spec, tiny_tokenizer, CONTEXT, seed=5)
    items = generated_items(split, 42, 5)
    assert Counter(task for task, _ in items) == {"profiles": 14, "arithmetic": 14, "programs": 14}
    assert len({item.key for _, item in items}) == 42
    for (task, item), segment in zip(items, segments, strict=True):
        assert split_of(item.key) is split
        ids, real, answer = train.encode([item], pad_answer=task in ("arithmetic", "programs"))
        assert list(segment.ids) == ids[0, real[0]].tolist()
        assert segment.prompt_length == len(segment.ids) - int(answer.sum())
        assert segment.text == f"{item.prompt} {item.answer}"


def test_testbed_runs_out_of_items(tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starquant.calibration.shipped_text._MISSES", 50)  # gives up sooner, at the same item each time
    found = generated_items(Split.TEST, 10**6, 0)
    assert len({item.key for _, item in found}) == len(found) < 10**5
    with pytest.raises(DataError, match=f"got {len(found) + 1}, .* has {len(found)} segments"):
        read_segments(source("testbed", len(found) + 1, 64, split="test"), tiny_tokenizer, CONTEXT, seed=0)


@pytest.mark.parametrize("kind", ["winogrande", "gsm8k", "testbed"])
def test_segments_depend_on_the_seed_only(
    kind: str, benchmark_data: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    def read(seed: int) -> list[Segment]:
        spec = source(kind, 8, 64)
        return read_segments(spec, tiny_tokenizer, CONTEXT, seed=seed, data_dir=str(benchmark_data))

    assert read(1) == read(1) and [s.text for s in read(1)] != [s.text for s in read(2)]


def test_real_files(benchmark_data: Path, bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    folder = str(benchmark_data)
    read = read_segments(source("winogrande", 16, 128), bytes_tokenizer, CONTEXT, seed=0, data_dir=folder)
    assert {len(s.ids) for s in read} == {128} and not any("_" in s.text for s in read)
    read = read_segments(source("gsm8k", 16, 256, split="test"), bytes_tokenizer, CONTEXT, seed=0, data_dir=folder)
    for s in read:
        prompt = bytes_tokenizer.decode(s.ids[: s.prompt_length])
        assert prompt.startswith("Question: ") and prompt.endswith("\nAnswer:") and s.text.startswith(prompt + " ")
        assert s.text.startswith(bytes_tokenizer.decode(s.ids).rstrip("\ufffd"))
        assert s.prompt_length < len(s.ids) <= 256


def test_fingerprint_stands_for_the_content(tmp_path: Path) -> None:
    one, same, other = tmp_path / "one.jsonl", tmp_path / "same.jsonl", tmp_path / "other.jsonl"
    for path, text in ((one, "a"), (same, "a"), (other, "b")):
        write_lines(path, {"text": text})
    prints = [fingerprint(source("text", path=str(path)), None) for path in (one, same, other)]
    assert prints[0] == prints[1] != prints[2] and all(len(p) == 16 and int(p, 16) >= 0 for p in prints)
    splits = {fingerprint(source("testbed", split=split), None) for split in ("train", "validation", "test")}
    assert len(splits) == 3 and fingerprint(source("testbed"), None) in splits


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    import datasets

    asked = []

    def load(name: str, config: str, *, split: str) -> list[dict[str, object]]:
        asked.append((name, config, split))
        return [sentence(i) for i in range(20)] if "winogrande" in name else [{"question": "how", "answer": "1"}] * 4

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_segments(source("winogrande", 4, 16), tiny_tokenizer, CONTEXT, seed=0)) == 4
    assert len(read_segments(source("gsm8k", split="test"), tiny_tokenizer, CONTEXT, seed=0)) == 4
    assert asked == [("allenai/winogrande", "winogrande_xl", "train"), ("openai/gsm8k", "main", "test")]
    prints = [fingerprint(source(k, split=s), None) for k, s in (("winogrande", "train"), ("gsm8k", "test"))]
    assert prints[0] != prints[1] != fingerprint(source("gsm8k", split="train"), None)


def test_without_the_hub_a_local_file_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = r"^a\.source: the data set openai/gsm8k .* a\.source\.path=FILE"
    with pytest.raises(DataError, match=message):
        read_segments(source("gsm8k"), tiny_tokenizer, CONTEXT, seed=0, where="a.source")
    with pytest.raises(DataError, match=message):
        fingerprint(source("gsm8k"), None, "a.source")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (source("testbed", length=257), r"^w\.length: got 257, allowed: at most the model's context of 256 tokens"),
        (source("testbed", length=20), r"^w\.length: got 20, allowed: at least \d+"),
        (source("testbed", path="x.txt"), r"^w\.path: got 'x.txt', allowed: null"),
        (source("text", path="x.csv"), r"^w\.path: got 'x.csv', allowed: a .txt or .jsonl file"),
        (source("gsm8k", split="validation"), r"^w\.split: got 'validation', allowed for 'gsm8k': train, test"),
        (source("winogrande", split="test"), r"^w\.split: got 'test', allowed for 'winogrande': train, validation"),
    ],
)
def test_bad_configuration(spec: SourceSpec, message: str, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=message):
        read_segments(spec, tiny_tokenizer, CONTEXT, seed=0, where="w")


GOOD = json.dumps(sentence())
BAD_FILES = [
    ("winogrande", b"", "holds no text"),
    ("winogrande", b" \n\n", "holds no text"),
    ("winogrande", f"{GOOD}\n{{".encode(), r"line 2: not valid JSON"),
    ("winogrande", f"{GOOD}\n\n{GOOD}\n".encode(), r"line 2: not valid JSON"),
    ("winogrande", f"{GOOD}\n[1]".encode(), r"line 2: expected a JSON object, got list"),
    ("winogrande", f"{GOOD}\n".encode() + b'{"sentence": "\xff"}', r"line 2: not UTF-8"),
    ("winogrande", json.dumps(sentence(answer="3")).encode(), r"line 1: field 'answer' is '3', allowed: '1' or '2'"),
    (
        "winogrande",
        json.dumps(sentence(sentence="no gap")).encode(),
        r"line 1: field 'sentence' has 0 '_', allowed: one",
    ),
    (
        "winogrande",
        json.dumps(sentence(sentence="a _ b _")).encode(),
        r"line 1: field 'sentence' has 2 '_', allowed: one",
    ),
    (
        "winogrande",
        json.dumps(sentence(option1="a", option2="a ")).encode(),
        r"line 1: field 'option2' is 'a ', allowed",
    ),
    ("winogrande", json.dumps(sentence(option1=1)).encode(), r"line 1: field 'option1' is 1, allowed: a text"),
    ("gsm8k", f'{{"question": "q", "answer": "a"}}\n{GOOD}'.encode(), r"line 2: missing field 'question'"),
    ("gsm8k", b'{"question": "q", "answer": " "}', r"line 1: field 'answer' is ' ', allowed: a text that is not empty"),
    ("text", b'{"body": "x"}', r"line 1: missing field 'text' \(or 'prompt' and 'answer'\)"),
    ("text", b'{"prompt": "x"}', r"line 1: missing field 'answer'"),
    ("text", b'{"text": "1 [MASK] 2"}', r"holds the mask token \[MASK\]"),
]


@pytest.mark.parametrize(("kind", "content", "message"), BAD_FILES)
def test_bad_files(
    kind: str, content: bytes, message: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_segments(source(kind, 1, 9, path=str(path)), tiny_tokenizer, CONTEXT, seed=0, where="w")
    assert str(caught.value).startswith("w:" if "mask" in message else f"w.path: {path}")


def test_missing_and_unreadable_files(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    for name, reason in (("none.txt", "no such file"), ("folder.txt", "cannot be read")):
        (tmp_path / "folder.txt").mkdir(exist_ok=True)
        spec = source("text", path=str(tmp_path / name))
        message = f"^calibration.source.path: .*{name}: {reason}"
        with pytest.raises(DataError, match=message):
            read_segments(spec, tiny_tokenizer, CONTEXT, seed=0)
        with pytest.raises(DataError, match=message):
            fingerprint(spec, None)


def test_the_models_mask_counts_where_the_tokenizer_names_none(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_lines(tmp_path / "text.jsonl", {"text": "the cat has 12 eggs"})
    spec, eggs = source("text", 1, 9, path=str(path)), bytes_tokenizer("12")["input_ids"][0]
    assert bytes_tokenizer.mask_token_id is None
    read_segments(spec, bytes_tokenizer, CONTEXT, seed=0)
    with pytest.raises(DataError, match=r"^w: the text holds the mask token 1, which stands for no text"):
        read_segments(spec, bytes_tokenizer, CONTEXT, seed=0, where="w", mask_id=eggs)


def test_prompts_that_are_cut_are_said(caplog: pytest.LogCaptureFixture) -> None:
    segments = [Segment((1, 2, 3, 4, 5), 3, ""), Segment((1, 2, 3, 4, 5), 2, "")]
    prompts_of(segments, 8, 11, "fidelity.source")
    assert caplog.messages == []
    prompts_of(segments, 8, 10, "fidelity.source")
    [line] = caplog.messages
    assert line.startswith("fidelity.source: 1 of 2 prompts leave no room for an answer of 8 tokens")


def test_prompts() -> None:
    asked, plain = Segment((1, 2, 3, 4, 5), 3, ""), Segment((1, 2, 3, 4, 5), 0, "")
    assert prompts_of([asked, plain, Segment((7,), 0, "")], 8, 100) == [(1, 2, 3), (1, 2), (7,)]
    assert prompts_of([asked, plain], 8, 10) == [(2, 3), (1, 2)]
    assert prompts_of([asked], 8, 10, bos=1) == [(1, 3)]
    assert prompts_of([asked], 8, 10, bos=2) == [(2, 3)]  # not what it begins with
    with pytest.raises(ConfigError, match="the answer's 8 tokens do not fit the model's context of 8"):
        prompts_of([asked], 8, 8)


@pytest.mark.parametrize("kind", ["smol", "smol_tasks", "smol_text"])
@pytest.mark.parametrize("split", list(Split))
def test_text_shipped_with_smol(kind: str, split: Split, bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    spec = source(kind, 16, 640, split=split.value)
    segments = read_segments(spec, bytes_tokenizer, 1024, seed=3)
    assert segments == read_segments(spec, bytes_tokenizer, 1024, seed=3)
    assert segments != read_segments(spec, bytes_tokenizer, 1024, seed=4)
    expected = {"smol": ["text", "tasks"], "smol_tasks": ["tasks"], "smol_text": ["text"]}[kind]
    assert [s.group for s in segments] == expected * (16 // len(expected))
    eos = bytes_tokenizer.eos_token_id
    for s in segments:
        decoded = bytes_tokenizer.decode([i for i in s.ids if i != eos])
        if s.group == "text":
            assert s.prompt_length == 1 and len(s.ids) == 640
            assert decoded.strip("\ufffd") in natural_text(split)
        else:
            prompt = bytes_tokenizer.decode(s.ids[: s.prompt_length])
            assert decoded == s.text and split_of_prompt(prompt) is split


def test_smol_text_and_tasks_have_digests_of_their_own() -> None:
    digests = [
        fingerprint(source(kind, split=split), None)
        for kind in ("smol", "smol_tasks", "smol_text")
        for split in ("train", "validation", "test")
    ]
    assert len(set(digests)) == 9
    with pytest.raises(ConfigError, match=r"got 'x', allowed: null for kind 'smol'"):
        fingerprint(source("smol", path="x"), None)


def test_smol_has_no_more_text_than_it_has(
    bytes_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither half makes up for the other."""
    with pytest.raises(DataError, match=r"w\.segments: got 400, but the source \(smol\) has \d+ segments"):
        read_segments(source("smol", 400, 640, split="test"), bytes_tokenizer, 1024, seed=0, where="w")
    monkeypatch.setattr("starquant.testbed.smol.tasks.items.MOST_MISSES", 100)
    with pytest.raises(DataError, match=r"w\.segments: got 3200, but [a-z]+ has only about \d+ items"):
        read_segments(source("smol_tasks", 3200, 640, split="test"), bytes_tokenizer, 1024, seed=0, where="w")
