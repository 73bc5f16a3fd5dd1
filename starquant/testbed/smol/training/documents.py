"""Natural text to train on: a folder that the user names, of which every 40th document is held out."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from starquant.errors import DataError
from starquant.testbed.items import Split

#: Every so many documents one is kept from training.
HELD_OUT_EVERY = 40
#: Tokens of the shortest document, and of the shortest piece of one, that is worth a segment.
SHORTEST = 12
_ENCODED_AT_ONCE = 1000


def read_documents(folder: Path) -> list[str]:
    """Return the documents of a folder, in the order of its paths: a .txt file is one, a line of a .jsonl file is one.

    Raises:
        DataError: no such folder, no document, or a file that is not UTF-8 or not lines of {"text": "..."}.
    """
    if not folder.is_dir():
        raise DataError(f"--text {folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl") and path.is_file())
    documents = [document for path in files for document in _documents_of(path)]
    if len(documents) < 2:
        raise DataError(
            f"--text {folder}: has {len(documents)} documents, needs 2 or more, since every {HELD_OUT_EVERY}th, from "
            'the first on, is held out (a .txt file is a document, and a line {"text": "..."} of a .jsonl file)'
        )
    return documents


def _documents_of(path: Path) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if path.suffix == ".txt":
        yield content
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield _text_of(line, f"{path}:{number}")


def _text_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        raise DataError(f"{place}: is not JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f'{place}: has no string "text"')
    return str(row["text"])


def digest_of_documents(documents: Iterable[str]) -> str:
    """Return a digest of documents and their order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode(errors="surrogatepass")).digest())
    return digest.hexdigest()[:16]


def of_split(documents: list[str], split: Split) -> list[str]:
    """Return the held-out documents (`Split.VALIDATION`), or those to train on (`Split.TRAIN`)."""
    held_out = split is Split.VALIDATION
    return [text for index, text in enumerate(documents) if (index % HELD_OUT_EVERY == 0) == held_out]


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """Return the token ids of texts; what reads like a special token is text."""
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


@dataclass(frozen=True)
class Text:
    """Tokens of documents, one after the other.

    Attributes:
        ids: of all documents.
        starts: where each document starts, and behind them where the last one ends.
    """

    ids: array[int]
    starts: list[int]

    def piece(self, rng: random.Random, length: int) -> list[int]:
        """Return `length` tokens of a document, or all of a shorter one; every token is about equally likely."""
        document = bisect_right(self.starts, rng.randrange(len(self.ids))) - 1
        start, end = self.starts[document], self.starts[document + 1]
        if end - start > length:
            start = rng.randrange(start, end - length + 1)
        return self.ids[start : min(end, start + length)].tolist()


def encode_documents(tokenizer: Tokenizer, documents: list[str], split: Split) -> Text:
    """Return the tokens of a split's documents, without those shorter than `SHORTEST`.

    Raises:
        DataError: no document is left.
    """
    ids, starts = array("i"), [0]
    texts = of_split(documents, split)
    for first in range(0, len(texts), _ENCODED_AT_ONCE):
        for document in encode(tokenizer, texts[first : first + _ENCODED_AT_ONCE]):
            if len(document) >= SHORTEST:
                ids.extend(document)
                starts.append(len(ids))
    if len(starts) == 1:
        what = "held out" if split is Split.VALIDATION else "to train on"
        raise DataError(f"--text: none of the {len(texts)} documents {what} has {SHORTEST} tokens")
    return Text(ids, starts)
