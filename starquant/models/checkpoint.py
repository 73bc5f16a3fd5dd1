"""A checkpoint folder, judged before any weight is read: JSON config, safetensors headers, shard index.

Only JSON and safetensors are ever opened. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starquant.errors import CheckpointError
from starquant.store.cache import content_digest
from starquant.store.hashing import pieces

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SHOWN = 5  # names that an error lists
_MAX_HEADER = 100 * 2**20  # safetensors' own limit
#: Bytes of a file whose own digest enters the fingerprint in place of its bytes.
LARGE = 1 << 30
#: What decides, beside config and weights, what a model reads and answers: vocabularies, templates, settings.
_BESIDE = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*")
#: safetensors' dtypes that weights may have, and the bits of all of them.
FLOATS = ("F32", "BF16", "F16", "F64")
_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", *_FLOAT8), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class Checkpoint:
    """What a valid checkpoint folder holds.

    Attributes:
        folder: the folder.
        config: the parsed config.json.
        shapes: parameter name -> shape, over all shards.
        stored: parameter name -> safetensors' name of its dtype.
        files: the safetensors files, in order.
    """

    folder: Path
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, str]
    files: tuple[Path, ...]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointError naming the file when it is missing, malformed or names a key twice."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits among them
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; raises ValueError for one that names a key twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is named twice")
    return values


def inspect(folder: Path) -> Checkpoint:
    """Check a checkpoint folder and return what it holds.

    Raises:
        CheckpointError: the folder, config.json, a shard or a parameter of the index is missing; a shard holds
            what the index gives to another or to none; the weights are pickles; a safetensors file is truncated
            or malformed.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    config = read_json(folder / CONFIG)
    if (folder / INDEX).exists():
        if (folder / WEIGHTS).exists():
            raise CheckpointError(f"{folder}: holds both {WEIGHTS} and {INDEX}; remove the one that is not meant")
        files, owner = _from_index(folder)
    else:
        _validate_safetensors(folder)
        files, owner = (folder / WEIGHTS,), None
    shapes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, str] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if owner is not None and owner.get(name) != file.name:
                raise CheckpointError(f"{file}: holds {name}, which {INDEX} gives to {owner.get(name, 'no file')}")
            shapes[name] = tuple(entry["shape"])
            stored[name] = entry["dtype"]
    missing = sorted(set(owner or ()) - set(shapes))
    if missing:
        raise CheckpointError(f"{folder / INDEX}: {owner[missing[0]]} does not hold {_some(missing)}")  # type: ignore[index]
    return Checkpoint(folder, config, shapes, stored, files)


def _validate_safetensors(folder: Path) -> None:
    if (folder / WEIGHTS).exists():
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: weights are pickled ({_some(pickles)}); only safetensors are read, because loading a "
            f"pickle can run code. Convert them to {WEIGHTS} first"
        )
    raise CheckpointError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there")


def _from_index(folder: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    owner = read_json(folder / INDEX).get("weight_map")
    if not isinstance(owner, dict) or not owner:
        raise CheckpointError(f"{folder / INDEX}: 'weight_map' is missing or empty")
    if not all(isinstance(name, str) for name in owner.values()):
        raise CheckpointError(f"{folder / INDEX}: 'weight_map' must give a file name to every parameter")
    names = sorted(set(owner.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: '{name}' is not the name of a safetensors file in this folder")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"{folder}: {len(absent)} of {len(names)} shards are missing: {_some(absent)}")
    return tuple(folder / name for name in names), owner


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Read the header of a safetensors file and check that it is sound and the file as long as it says."""
    if not file.is_file():
        raise CheckpointError(f"{file}: not a file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{file}: truncated or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{file}: not a safetensors file (its header is not JSON)") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: not a safetensors file (its header is not an object)")
    header.pop("__metadata__", None)
    expected = 8 + length + max((_validate_entry(file, *item) for item in header.items()), default=0)
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise CheckpointError(f"{file}: {what}: its header announces {expected} bytes, the file has {size}")
    return header


def _validate_entry(file: Path, name: str, entry: Any) -> int:
    """Return where a tensor's data end; raises CheckpointError when dtype, shape and offsets do not agree."""
    try:
        begin, end = entry["data_offsets"]
        numbers = (begin, end, *entry["shape"])
        bits = math.prod(entry["shape"]) * _DTYPE_BITS[entry["dtype"]]
        sound = all(type(n) is int and n >= 0 for n in numbers) and begin <= end and 8 * (end - begin) == bits
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: damaged header: dtype, shape and offsets of {name} do not agree")
    return int(end)


def validate_shapes(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    optional: frozenset[str] = frozenset(),
    kinds: Mapping[str, tuple[str, ...]] | None = None,
) -> None:
    """Compare names, shapes and dtypes (`kinds`: those each may have) with the architecture's.

    Raises:
        CheckpointError: names every kind of difference.
    """
    problems = []
    if missing := sorted(set(expected) - set(checkpoint.shapes) - optional):
        problems.append(f"{len(missing)} parameters are missing: {_some(missing)}")
    if unexpected := sorted(set(checkpoint.shapes) - set(expected)):
        problems.append(f"{len(unexpected)} parameters are unexpected: {_some(unexpected)}")
    misshapen = [
        f"{name} has shape {list(checkpoint.shapes[name])}, config.json implies {list(shape)}"
        for name, shape in expected.items()
        if name in checkpoint.shapes and checkpoint.shapes[name] != shape
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} parameters are misshapen: {_some(misshapen)}")
    mistyped = [
        f"{name} is stored as {_dtype_name(checkpoint.stored[name])}, allowed: {', '.join(allowed)}"
        for name, allowed in (kinds or {}).items()
        if name in checkpoint.stored and checkpoint.stored[name] not in allowed
    ]
    if mistyped:
        problems.append(f"{len(mistyped)} parameters are of another dtype: {_some(mistyped)}")
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: " + "; ".join(problems))


def _dtype_name(stored: str) -> str:
    return f"{stored} (float8)" if stored in _FLOAT8 else stored


def fingerprint(folder: Path) -> str:
    """Return a short digest of a checkpoint's content: config, weights, and the files of tokenizer and generation.

    Every file counts by name, size and bytes, to its end; what was computed of files beyond 1 GiB is kept
    (`starquant/store/cache.py:content_digest`).

    Raises:
        CheckpointError: as `inspect`; a file that cannot be read.
    """
    checkpoint = inspect(folder)
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for file in (*checkpoint.files, *_files_beside(folder)):
        try:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()}:{size}".encode())
            for piece in [content_digest(file).encode()] if size > LARGE else pieces(file):
                digest.update(piece)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


def _files_beside(folder: Path) -> list[Path]:
    """Return the files that a tokenizer and generation may be read from, in order."""
    paths = sorted({path for pattern in _BESIDE for path in folder.glob(pattern)} - {folder / CONFIG, folder / INDEX})
    for path in paths:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{path}: cannot be read: allowed: a regular file")
    return [path for path in paths if path.is_file()]


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
