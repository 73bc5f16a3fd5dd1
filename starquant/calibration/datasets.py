"""The items a source is made of: lines of local files or rows of the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starquant.calibration.shipped_text import KINDS as SHIPPED
from starquant.config.calibration import SourceSpec
from starquant.errors import ConfigError, DataError


@dataclass(frozen=True)
class DataSet:
    """A data set with a hub name and a place in the offline data folder.

    Attributes:
        hub: repository and configuration on the hub.
        splits: those that have answers.
        fields: what every item must have.
    """

    hub: tuple[str, str]
    splits: tuple[str, ...]
    fields: tuple[str, ...]


DATA_SETS = {
    "winogrande": DataSet(
        ("allenai/winogrande", "winogrande_xl"), ("train", "validation"), ("sentence", "option1", "option2", "answer")
    ),
    "gsm8k": DataSet(("openai/gsm8k", "main"), ("train", "test"), ("question", "answer")),
}


def source_file(spec: SourceSpec, data_dir: str | None) -> Path | None:
    """Return the local file a source is read from: its own path, else its place below `data_dir`, else None."""
    if spec.path is not None:
        return Path(spec.path).expanduser()
    if data_dir is None or spec.kind not in DATA_SETS:
        return None
    path = Path(data_dir).expanduser() / spec.kind / f"{spec.split}.jsonl"
    return path if path.is_file() else None


def is_on_hub(spec: SourceSpec, data_dir: str | None) -> bool:
    """Return whether the items of a source are fetched from the hub."""
    return spec.kind in DATA_SETS and source_file(spec, data_dir) is None


def validate_source(spec: SourceSpec, where: str) -> None:
    """Judge what needs no data: the split of a data set, the path's suffix.

    Raises:
        ConfigError: a split without answers, a path where none is read, a file that is neither .txt nor .jsonl.
    """
    if spec.kind in SHIPPED and spec.path is not None:
        raise ConfigError(f"{where}.path: got '{spec.path}', allowed: null for kind '{spec.kind}', which is shipped")
    if spec.kind == "text" and Path(spec.path or "").suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"{where}.path: got '{spec.path}', allowed: a .txt or .jsonl file")
    if spec.kind in DATA_SETS and spec.path is None and spec.split not in DATA_SETS[spec.kind].splits:
        allowed = ", ".join(DATA_SETS[spec.kind].splits)
        raise ConfigError(f"{where}.split: got '{spec.split}', allowed for '{spec.kind}': {allowed}")


def read_bytes(path: Path, where: str) -> bytes:
    """Return a file's content; raises DataError when it is missing, unreadable or empty."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{where}.path: {path}: no such file") from None
    except OSError as error:
        raise DataError(f"{where}.path: {path}: cannot be read: {error.strerror}") from None
    if not content.strip():
        raise DataError(f"{where}.path: {path}: holds no text")
    return content


def read_text(path: Path, where: str) -> str:
    """Return a file's text; raises DataError as `read_bytes`, and when it is not UTF-8."""
    content = read_bytes(path, where)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{where}.path: {path}, line {line}: not UTF-8 ({error.reason})") from None


def rows(spec: SourceSpec, data_dir: str | None, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, fields) of every item, the place being what an error about it names.

    Raises:
        DataError: a file that cannot be read, a line that is not a JSON object; a data set the hub does not give.
    """
    path = source_file(spec, data_dir)
    if path is None:
        name = DATA_SETS[spec.kind].hub[0]
        for index, item in enumerate(_hub(spec, where)):
            yield f"{name}, {spec.split} item {index}", item
        return
    # Not str.splitlines: it also splits at characters that JSON strings may hold, such as U+2028.
    for number, line in enumerate(read_text(path, where).rstrip("\n").split("\n"), 1):
        place = f"{where}.path: {path}, line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:  # also an integer of too many digits
            raise DataError(f"{place}: not valid JSON ({error})") from None
        if not isinstance(item, dict):
            raise DataError(f"{place}: expected a JSON object, got {type(item).__name__}")
        yield place, item


def text_field(item: Mapping[str, Any], name: str, place: str) -> str:
    """Return a field that must be a text with something in it; raises DataError naming the place."""
    if name not in item:
        raise DataError(f"{place}: missing field '{name}'")
    value = item[name]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: field '{name}' is {value!r}, allowed: a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: field '{name}' holds a lone surrogate, which is no text") from None
    return value


def _hub(spec: SourceSpec, where: str) -> Iterator[dict[str, Any]]:
    name, config = DATA_SETS[spec.kind].hub
    try:
        from datasets import load_dataset

        yield from load_dataset(name, config, split=spec.split)
    except Exception as error:  # offline, gone, gated, a broken cache: all mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{where}: the data set {name} ({config}, {spec.split}) could not be read from the hub "
            f"({type(error).__name__}: {reason}). A local JSON Lines file can be given with {where}.path=FILE; "
            f"{where.split('.')[0]}=none does without"
        ) from None
