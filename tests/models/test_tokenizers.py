"""Both published tokenizer layouts load without remote code and encode exactly."""

from __future__ import annotations

import itertools
import json
import unicodedata
from pathlib import Path

import pytest
import regex
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from starquant.errors import CheckpointError
from starquant.models import load_tokenizer

# Qwen2's pre-tokenization, part by part.
SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
TEXTS = [
    "",
    " ",
    "Hello world",
    "the theatre there, then these",
    "I'm sure they're here; you've seen it's John's, isn't it? WE'LL SEE, I'D SAY",
    "  leading, double  inner   and trailing spaces   ",
    "tabs\tand\t\ttabs \t mixed",
    "one\ntwo\n\nthree\r\nfour \n five\n   indented\n",
    "1234567890 3.14159 12,345 x2 2x ½ ² Ⅷ ٣٤٥",
    "naïve café déjà vu, Größe, Ærøskøbing, Đà Nẵng, Łódź",
    "中文分词测试，你好世界！数字123和英文abc混合。",  # noqa: RUF001
    "日本語テキスト、한국어 문장 Привет мир مرحبا שלום नमस्ते",
    "emoji 🙂 \U0001f469\u200d\U0001f469\u200d\U0001f467 and \u200b zero width",
    "def f(x):\n    return x**2 != {'a': [1, -2]}  # comment\n",
    "spaces before punctuation , . ! ? n 't 's are kept",
    "nul \x00 and \x7f and \x85 and \u2028 bytes",
    "\N{NO-BREAK SPACE}no-break\N{IDEOGRAPHIC SPACE}ideographic",
]


def training_lines() -> list[str]:
    words = "the then there these theatre here John sure café naïve Größe".split()
    words += "你好 世界 中文 Привет return def x 12 345".split()
    return [" ".join(pair) + "." for pair in itertools.product(words, words)] + TEXTS


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(training_lines(), trainer)
    return tokenizer


@pytest.fixture(scope="module")
def dream_folder(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files a Dream checkpoint ships, with a booby-trapped Python class."""
    folder = tmp_path_factory.mktemp("dream")
    trained.model.save(str(folder))
    first = trained.get_vocab_size()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {str(first + i): {"content": token, **flags} for i, token in enumerate(SPECIAL)},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_bos_token": False,
        "add_prefix_space": False,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "mask_token": "<|mask|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_dream.py").write_text("raise SystemExit('remote code ran')\n")
    return folder


@pytest.fixture(scope="module")
def dream(dream_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(dream_folder)


class SlowBPE:
    """Byte-level BPE over vocab.json and merges.txt, one merge at a time."""

    def __init__(self, folder: Path) -> None:
        self.vocab: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        self.rank = {pair: rank for rank, pair in enumerate(pairs)}
        self.special = {token: len(self.vocab) + index for index, token in enumerate(SPECIAL)}
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [byte for byte in range(256) if byte not in printable]
        self.letter = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

    def word(self, text: str) -> list[int]:
        parts = [self.letter[byte] for byte in text.encode("utf-8")]
        while True:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in itertools.pairwise(parts)]
            best = min(ranks, default=len(self.rank))
            if best == len(self.rank):
                return [self.vocab[part] for part in parts]
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in regex.split("(" + "|".join(map(regex.escape, SPECIAL)) + ")", text):
            if piece in self.special:
                ids.append(self.special[piece])
                continue
            for word in regex.findall(SPLIT, unicodedata.normalize("NFC", piece)):
                ids += self.word(word)
        return ids


@pytest.mark.parametrize("text", TEXTS)
def test_dream_encodes_like_the_slow_bpe(text: str, dream: PreTrainedTokenizerBase, dream_folder: Path) -> None:
    assert dream(text)["input_ids"] == SlowBPE(dream_folder).encode(text)


def test_dream_merges_are_used(dream: PreTrainedTokenizerBase) -> None:
    text = "the theatre there"
    assert len(dream(text)["input_ids"]) < len(text) / 2


@pytest.mark.parametrize("text", TEXTS)
def test_dream_decodes_what_it_encoded(text: str, dream: PreTrainedTokenizerBase) -> None:
    assert unicodedata.is_normalized("NFC", text)
    assert dream.decode(dream(text)["input_ids"]) == text


def test_dream_normalises_to_composed_characters(dream: PreTrainedTokenizerBase, dream_folder: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "café Größe")
    ids = dream(decomposed)["input_ids"]
    assert ids == SlowBPE(dream_folder).encode(decomposed) == dream("café Größe")["input_ids"]


def test_dream_special_tokens_have_the_listed_ids(dream: PreTrainedTokenizerBase, dream_folder: Path) -> None:
    first = len(json.loads((dream_folder / "vocab.json").read_text(encoding="utf-8")))
    assert dream.convert_tokens_to_ids(SPECIAL) == [first + index for index in range(len(SPECIAL))]
    assert len(dream) == first + len(SPECIAL), "no token was added on the way"
    ids = (dream.eos_token_id, dream.pad_token_id, dream.bos_token_id, dream.mask_token_id)
    assert ids == (first, first, first + 3, first + 4)


def test_dream_special_tokens_inside_text(dream: PreTrainedTokenizerBase, dream_folder: Path) -> None:
    text = "<|beginoftext|><|im_start|>user\nHello  <|mask|><|mask|> world <|im_end|>\n<|endoftext|>"
    ids = dream(text)["input_ids"]
    assert ids == SlowBPE(dream_folder).encode(text)
    assert ids.count(dream.mask_token_id) == 2
    assert dream.decode(ids) == text
    assert dream.decode(ids, skip_special_tokens=True) == "user\nHello   world \n"


def test_dream_mask_token_round_trips(dream: PreTrainedTokenizerBase) -> None:
    assert dream(dream.mask_token)["input_ids"] == [dream.mask_token_id]
    assert dream.decode([dream.mask_token_id]) == "<|mask|>"


def test_dream_adds_nothing_by_itself(dream: PreTrainedTokenizerBase) -> None:
    assert dream("")["input_ids"] == []
    with_special = dream("Hello", add_special_tokens=True)["input_ids"]
    assert with_special == dream("Hello", add_special_tokens=False)["input_ids"]


def test_dream_pads_a_batch(dream: PreTrainedTokenizerBase) -> None:
    batch = dream(["Hello", "Hello world 中文"], padding=True)
    short, long = (len(dream(text)["input_ids"]) for text in ("Hello", "Hello world 中文"))
    assert [sum(mask) for mask in batch["attention_mask"]] == [short, long]
    assert batch["input_ids"][0].count(dream.pad_token_id) == long - short


@pytest.fixture
def llada_folder(trained: Tokenizer, tmp_path: Path) -> Path:
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|startoftext|>",
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "trust_remote_code": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("text", [*TEXTS, "<|startoftext|>a <|mdm_mask|> b<|endoftext|>"])
def test_llada_encodes_as_its_tokenizer_json_says(text: str, llada_folder: Path) -> None:
    tokenizer = load_tokenizer(llada_folder)
    ids = tokenizer(text)["input_ids"]
    assert ids == Tokenizer.from_file(str(llada_folder / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(ids) == text


def test_llada_special_tokens_and_template(llada_folder: Path, trained: Tokenizer) -> None:
    tokenizer, first = load_tokenizer(llada_folder), trained.get_vocab_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (first, first + 1, first + 1)
    assert tokenizer.convert_tokens_to_ids("<|mdm_mask|>") == len(tokenizer) - 1 == first + 2
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi"


def test_tokenizer_json_alone_is_enough(llada_folder: Path) -> None:
    (llada_folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(str(llada_folder)).decode(load_tokenizer(llada_folder)("Hello world")["input_ids"]) == (
        "Hello world"
    )


@pytest.mark.parametrize("present", [(), ("tokenizer_config.json",), ("vocab.json",), ("merges.txt",)])
def test_folder_without_a_tokenizer(present: tuple[str, ...], dream_folder: Path, tmp_path: Path) -> None:
    for name in present:
        (tmp_path / name).write_bytes((dream_folder / name).read_bytes())
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "tokenizer.json" in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        load_tokenizer(tmp_path / "absent")


def test_malformed_tokenizer_config(llada_folder: Path) -> None:
    (llada_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(llada_folder)
