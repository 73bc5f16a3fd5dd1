"""What a method learned: named tensors a part of the model, in memory or in a folder of safetensors files."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from starquant.errors import RecordError
from starquant.store.files import FileEntry, set_aside, write_atomically
from starquant.store.verification import is_intact, sealed

log = logging.getLogger(__name__)

ENDS = "ends"
NOTES, UNFINISHED = "fitted.json", "unfinished.json"


def block_part(index: int) -> str:
    """Return the name of a block's part."""
    return f"block_{index:03d}"


@dataclass(frozen=True)
class _Written:
    """What was written of a part, and how many notes and rows of the report there were by then."""

    file: FileEntry
    notes: int
    report: int


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
    _written: dict[str, _Written] = field(default_factory=dict)  # in the order in which they were learned

    def put(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Keep a part's tensors."""
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self._parts[part] = tensors if self.folder is None else None
        if self.folder is not None:
            entry = _write(self.folder, part, tensors)
            first = self._written.get(part)  # one that is put again has told already what it had to tell
            notes, report = (first.notes, first.report) if first else (len(self.notes), len(self.report))
            self._written[part] = _Written(entry, notes, report)
            self._list_unfinished(self.folder / UNFINISHED)

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
        _write_json(path, {"notes": self.notes, "report": self.report, "parts": self.parts()})

    def _list_unfinished(self, path: Path) -> None:
        parts = {
            part: written.file.model_dump() | {"notes": written.notes, "report": written.report}
            for part, written in self._written.items()
        }
        _write_json(path, sealed({"notes": self.notes, "report": self.report, "parts": parts}))

    @classmethod
    def resume(cls, folder: Path) -> Fitted:
        """Open a folder to go on fitting into it; a fresh one when nothing was finished there.

        What is not what was written is set aside: the folder when it is its list, else the part, and it is fitted
        again with all that was learned after it.
        """
        path = folder / UNFINISHED
        if not path.exists():
            return cls(folder)
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            if not is_intact(listed):
                raise ValueError("its content is not that of its seal")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            set_aside(folder, f"{path}: not what was written ({error})")
            return cls(folder)
        fitted, kept = cls(folder), (0, 0)
        for part, entry in listed["parts"].items():
            notes, report = entry.pop("notes"), entry.pop("report")
            written = _Written(FileEntry.model_validate(entry), notes, report)
            if not _is_sound(folder / f"{part}.safetensors", written.file):
                break
            fitted._parts[part], fitted._written[part] = None, written
            kept = (notes, report)
        fitted.notes, fitted.report = listed["notes"][: kept[0]], listed["report"][: kept[1]]
        return fitted

    @classmethod
    def load(cls, folder: Path) -> Fitted:
        """Open a folder; parts are read when asked for.

        Raises:
            RecordError: there is no such artifact, or it is damaged.
        """
        try:
            listed = json.loads((folder / NOTES).read_text(encoding="utf-8"))
            notes, report = list(listed["notes"]), list(listed.get("report", []))
            parts = dict.fromkeys(listed["parts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{folder / NOTES}: not readable as a fitted method ({error})") from None
        return cls(folder, notes, report, parts)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(value, indent=1) + "\n")
    except OSError as error:
        raise RecordError(f"{path}: cannot be written: {error}") from error


def _is_sound(path: Path, entry: FileEntry) -> bool:
    """Return whether a part is what was written; one that is not is set aside."""
    try:
        entry.validate_file(path)
    except RecordError as error:
        if path.exists():
            set_aside(path, str(error))
        else:
            log.warning("%s; computed again", error)
        return False
    return True


def _write(folder: Path, part: str, tensors: dict[str, Tensor]) -> FileEntry:
    unfinished = folder / f".{part}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished)
        entry = FileEntry.of(unfinished)
        unfinished.replace(folder / f"{part}.safetensors")
        return entry
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{folder / part}.safetensors: cannot be written: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecordError(f"{path}: missing or damaged ({error}); fit again") from None
