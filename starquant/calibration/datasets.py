"""The items a source is made of: lines of local files or rows of the hub."""

from __future__ import annotations

import random
import reprlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from starquant.calibration.json_lines import items_lines, opened, parse_object
from starquant.calibration.shipped_text import KINDS as SHIPPED
from starquant.config.calibration import SourceSpec
from starquant.errors import ConfigError, DataError
from starquant.models.hub import cache_fault, silent_retries

T = TypeVar("T")


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
    for _, place, item in _local(path, where):
        yield place, item


def shuffled(
    spec: SourceSpec,
    data_dir: str | None,
    where: str,
    order: random.Random,
    read: Callable[[str, dict[str, Any]], T],
) -> Iterator[T]:
    """Judge every item, then yield what `read` makes of them, in random order; a file's items are not kept in memory.

    Raises:
        DataError: as `rows`, and what `read` raises.
    """
    path = source_file(spec, data_dir)
    if path is None:
        items = [read(place, item) for place, item in rows(spec, data_dir, where)]
        order.shuffle(items)
        yield from items
        return
    offsets = array("Q")
    for offset, place, item in _local(path, where):
        read(place, item)
        offsets.append(offset)
    order.shuffle(offsets)
    with opened(path, f"{where}.path: {path}") as stream:
        for offset in offsets:
            stream.seek(offset)
            place = f"{where}.path: {path}, byte {offset}"
            yield read(place, parse_object(stream.readline(), place))


def _local(path: Path, where: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield offset, place and fields of every line that holds an item."""
    file, place = f"{where}.path: {path}", None
    for offset, place, line in items_lines(path, file):
        yield offset, place, parse_object(line, place)
    if place is None:
        raise DataError(f"{file}: holds no text")


def text_field(item: Mapping[str, Any], name: str, place: str) -> str:
    """Return a field that must be a text with something in it; raises DataError naming the place."""
    if name not in item:
        raise DataError(f"{place}: missing field '{name}'")
    value = item[name]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: field '{name}' is {reprlib.repr(value)}, allowed: a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: field '{name}' holds a lone surrogate, which is no text") from None
    return value


def _hub(spec: SourceSpec, where: str) -> Iterator[dict[str, Any]]:
    name, config = DATA_SETS[spec.kind].hub
    try:
        from datasets import load_dataset

        with silent_retries():
            items = load_dataset(name, config, split=spec.split)
        yield from items
    except Exception as error:  # offline, gone, gated, a broken cache: all mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{where}: the data set {name} ({config}, {spec.split}) could not be read from the hub "
            f"({type(error).__name__}: {reason}). A local JSON Lines file can be given with {where}.path=FILE; "
            f"{where.split('.')[0]}=none does without{cache_fault()}"
        ) from None
