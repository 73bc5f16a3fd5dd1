"""A checkpoint folder, judged before any weight is read: JSON config, safetensors headers, shard index.

Only JSON and safetensors are ever opened. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starquant.errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_HEADER = 100 * 2**20  # safetensors' own limit
_FINGERPRINT_BLOCKS, _BLOCK = 64, 4096


@dataclass(frozen=True)
class Checkpoint:
    """What a valid checkpoint folder holds.

    Attributes:
        folder: the folder.
        config: the parsed config.json.
        shapes: parameter name -> shape, over all shards.
        files: the safetensors files, in order.
    """

    folder: Path
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    files: tuple[Path, ...]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointError naming the file when it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def inspect(folder: Path) -> Checkpoint:
    """Check a checkpoint folder and return what it holds.

    Raises:
        CheckpointError: the folder, config.json, a shard or a parameter of the index is missing; the weights
            are pickles; a safetensors file is truncated or malformed.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    config = read_json(folder / CONFIG)
    if (folder / INDEX).exists():
        files, owner = _from_index(folder)
    else:
        _require_safetensors(folder)
        files, owner = (folder / WEIGHTS,), None
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if owner is None or owner.get(name) == file.name:
                shapes[name] = tuple(entry["shape"])
    missing = sorted(set(owner or ()) - set(shapes))
    if missing:
        raise CheckpointError(f"{folder / INDEX}: {owner[missing[0]]} does not hold {_some(missing)}")  # type: ignore[index]
    return Checkpoint(folder, config, shapes, files)


def _require_safetensors(folder: Path) -> None:
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
    names = sorted(set(owner.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: '{name}' is not the name of a safetensors file in this folder")
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise CheckpointError(f"{folder}: {len(absent)} of {len(names)} shards are missing: {_some(absent)}")
    return tuple(folder / name for name in names), owner


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Read the header of a safetensors file and check that the file is as long as it says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{file}: truncated or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise CheckpointError(f"{file}: not a safetensors file (its header is not JSON)") from None
    header.pop("__metadata__", None)
    try:
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise CheckpointError(f"{file}: not a safetensors file (its header lacks shapes or offsets)") from None
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise CheckpointError(f"{file}: {what}: its header announces {expected} bytes, the file has {size}")
    return header


def expect_parameters(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], optional: frozenset[str] = frozenset()
) -> None:
    """Compare names and shapes with the architecture's; raises CheckpointError naming every kind of difference."""
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
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: " + "; ".join(problems))


def fingerprint(folder: Path) -> str:
    """Return a short digest of a checkpoint's content: config, headers, sizes and sampled blocks of each file.

    Sampling (64 blocks of 4 KiB a file) keeps it under a second for 16 GB; any retraining changes every block.
    """
    checkpoint = inspect(folder)
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for file in checkpoint.files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for index in range(_FINGERPRINT_BLOCKS):
                stream.seek(index * max(size - _BLOCK, 0) // (_FINGERPRINT_BLOCKS - 1), os.SEEK_SET)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:16]


def _some(names: list[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
