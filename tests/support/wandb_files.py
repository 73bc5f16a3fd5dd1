"""What W&B has written offline, read without W&B's own reader: a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FULL, LAST = 32 * 1024, 1, 4


def records_of(path: Path) -> Iterator[Record]:
    """Seven bytes of file header; then blocks of chunks: crc32, length, type (full, first, middle, last), payload."""
    data, at, payload = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + 7 : at + 7 + length]
        assert zlib.crc32(bytes([kind]) + chunk) == checksum
        payload, at = payload + chunk, at + 7 + length
        if kind in (FULL, LAST):
            yield Record.FromString(payload)
            payload = b""


@dataclass
class OfflineRun:
    """One offline run as its .wandb file tells it.

    Attributes:
        run: the protobuf message that starts it.
        history: rows in order; nested keys are joined with a slash.
        artifacts: name to protobuf message.
    """

    folder: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    artifacts: dict[str, Any] = field(default_factory=dict)
    ended: bool = False


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_run(folder: Path) -> OfflineRun:
    """Read the one .wandb file of an offline run's folder."""
    (path,) = folder.glob("*.wandb")
    found = OfflineRun(folder)
    for record in records_of(path):
        match record.WhichOneof("record_type"):
            case "run":
                found.run = record.run
                found.config |= _values(record.run.config.update)
            case "summary":
                found.summary |= _values(record.summary.update)
            case "history":
                found.history.append(_values(record.history.item))
            case "metric":
                found.metrics[record.metric.glob_name] = record.metric.step_metric
            case "files":
                found.files += [file.path for file in record.files.files]
            case "artifact":
                found.artifacts[record.artifact.name] = record.artifact
            case "exit":
                found.ended = record.exit.exit_code == 0
    return found


def offline_runs(folder: Path) -> dict[str, list[OfflineRun]]:
    """Read all runs below a tracker's folder, by run id, the oldest first."""
    found: dict[str, list[OfflineRun]] = {}
    for one in sorted(folder.glob("wandb/offline-run-*")):
        run = read_run(one)
        found.setdefault(run.run.run_id, []).append(run)
    return found
