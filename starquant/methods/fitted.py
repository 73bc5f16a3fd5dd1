"""What a method learned: named tensors a part of the model, in memory or in a folder of safetensors files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from starquant.errors import RecordError

ENDS = "ends"
NOTES, UNFINISHED = "fitted.json", "unfinished.json"


def block_part(index: int) -> str:
    """Return the name of a block's part."""
    return f"block_{index:03d}"


@dataclass
class Fitted:
    """Tensors by part: "ends" (embedding, last norm, head) and one part a block.

    With a folder, every part is written as soon as it is learned and read again when it is asked for: memory
    holds one part at a time, whatever the depth of the model, and a killed fit goes on from its last part
    (`resume`). Files of other fits in the folder are not read.

    Attributes:
        folder: where parts are kept; None keeps them in memory.
        notes: fallbacks that were taken (a channel left alone, a damping raised), as plain data for the record.
        report: what each site got (choices, errors), one row each, for the record as well.
    """

    folder: Path | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)
    report: list[dict[str, Any]] = field(default_factory=list)
    _parts: dict[str, dict[str, Tensor] | None] = field(default_factory=dict)  # None: in the folder

    def put(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Keep a part's tensors."""
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self._parts[part] = tensors if self.folder is None else None
        if self.folder is not None:
            _write(self.folder, part, tensors)
            self._list(self.folder / UNFINISHED)

    def __contains__(self, part: str) -> bool:
        return part in self._parts

    def get(self, part: str) -> dict[str, Tensor]:
        """Return a part's tensors, empty when nothing was learned for it.

        Raises:
            RecordError: its file is missing or damaged.
        """
        tensors = self._parts.get(part, {})
        if tensors is None:
            assert self.folder is not None
            return _read(self.folder / f"{part}.safetensors")
        return dict(tensors)

    def note(self, what: str, where: str, **details: Any) -> None:
        """Keep a fallback for the record, once: a fit that goes on may come by it again."""
        note = {"what": what, "where": where, **details}
        if note not in self.notes:
            self.notes.append(note)

    def parts(self) -> list[str]:
        """Return the parts that hold something."""
        return sorted(self._parts)

    def save(self, folder: Path) -> None:
        """Write all parts and the notes to a folder; parts that are kept there stay as they are."""
        for part in self.parts() if folder != self.folder else ():
            _write(folder, part, self.get(part))
        self._list(folder / NOTES)
        (folder / UNFINISHED).unlink(missing_ok=True)

    def _list(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        listed = {"notes": self.notes, "report": self.report, "parts": self.parts()}
        part.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def resume(cls, folder: Path) -> Fitted:
        """Open a folder to go on fitting into it; a fresh one when nothing was finished there."""
        return cls._open(folder, UNFINISHED) if (folder / UNFINISHED).exists() else cls(folder)

    @classmethod
    def load(cls, folder: Path) -> Fitted:
        """Open a folder; parts are read when asked for.

        Raises:
            RecordError: there is no such artifact, or it is damaged.
        """
        return cls._open(folder, NOTES)

    @classmethod
    def _open(cls, folder: Path, name: str) -> Fitted:
        try:
            listed = json.loads((folder / name).read_text(encoding="utf-8"))
            notes, report = list(listed["notes"]), list(listed.get("report", []))
            parts = dict.fromkeys(listed["parts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{folder / name}: not readable as a fitted method ({error})") from None
        return cls(folder, notes, report, parts)


def _write(folder: Path, part: str, tensors: dict[str, Tensor]) -> None:
    unfinished = folder / f".{part}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished)
        unfinished.replace(folder / f"{part}.safetensors")
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{folder / part}.safetensors: cannot be written: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecordError(f"{path}: missing or damaged ({error}); fit again") from None
