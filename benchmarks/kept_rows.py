"""A file of measurements that grows by rows: what it holds is not measured again."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from starquant.kernels import tiles
from starquant.kernels.dispatch import HAS_TRITON

#: What decides how fast a model runs, samplers among it.
ROOMS = ("diffusion", "kernels", "models", "numerics", "packed", "quantized")
#: Files here that decide what is measured, and how.
MEASURING = ("efficiency.py", "evaluation.py", "measure.py", "packed_models.py")


def code_files() -> list[Path]:
    """Return the files that rows depend on."""
    here = Path(__file__).parent
    package = here.parent / "starquant"
    rooms = (path for room in ROOMS for kind in ("*.py", "*.json") for path in (package / room).rglob(kind))
    return sorted([*(here / name for name in MEASURING), *rooms])


def code_digest() -> str:
    """Return twelve hexadecimal digits of the code that is measured, and of what measures it."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def settings_digest(device: str) -> str:
    """Return twelve hexadecimal digits of the launch settings that were measured on a card, shipped or the user's."""
    settings = asdict(tiles.MEASURED.get(device, tiles.NOTHING))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class Results:
    """The file of rows; written whole after each.

    Args:
        path: None for none.
        device: name; a file of another device, of other kernels or other launch settings of them, is refused.
        ceilings: of the device.
    """

    KEYS = ("model", "shape", "precision", "ends", "launch", "kind", "batch", "tokens")

    def __init__(self, path: Path | None, device: str, ceilings: dict[str, float]) -> None:
        self.path, self.device, self.ceilings = path, device, ceilings
        self.code, self.settings, self.rows = code_digest(), settings_digest(device), list[dict[str, Any]]()
        if path is not None and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["device"] != device:
                raise SystemExit(f"error: {path}: was measured on {content['device']}, this is {device}; name another")
            if content.get("code") != self.code:
                raise SystemExit(f"error: {path}: was measured with other code ({content.get('code')}); name another")
            if content.get("settings") != self.settings:
                raise SystemExit(f"error: {path}: was measured with other launch settings (tiles.json); name another")
            self.rows = content["rows"]

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether a row was measured."""
        return any(all(row[key] == known.get(key) for key in self.KEYS) for known in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            record = {"schema_version": 3, "device": self.device, "torch": torch.__version__, "code": self.code}
            record["settings"] = self.settings
            record |= {"triton": HAS_TRITON, "ceilings": self.ceilings, "rows": self.rows}
            work = self.path.with_name(self.path.name + ".part")
            work.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            os.replace(work, self.path)
