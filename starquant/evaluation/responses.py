"""Answers to single requests, kept on disk as they are found: a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from starquant.errors import RecordError

#: A log-likelihood, two estimates of one, or a text.
Answer = float | list[float] | str


class ResponseLog:
    """A request-to-answer map, appended to a JSONL file answer by answer.

    Args:
        path: the file; None keeps answers in memory only. What follows the first line that is not whole (the
            run was killed while writing) is dropped.
        rank: of the process; all but the first write to files of their own beside it, and every process reads all,
            so that a run may go on with another number of processes.
    """

    def __init__(self, path: Path | None, rank: int = 0) -> None:
        self._answers: dict[str, Answer] = {}
        self._path = path if path is None or rank == 0 else path.with_suffix(f".rank{rank}.jsonl")
        if path is None:
            return
        for file in sorted(path.parent.glob(f"{path.stem}*.jsonl")):
            if file == path or file.name.startswith(f"{path.stem}.rank"):
                self._read(file)

    def _read(self, path: Path) -> None:
        content, sound = path.read_bytes(), 0
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self._answers[entry["key"]] = entry["answer"]
            except (ValueError, TypeError, KeyError):
                break
            sound += len(line)
        if sound < len(content) and path == self._path:
            with path.open("r+b") as stream:
                stream.truncate(sound)

    @staticmethod
    def key(kind: str, arguments: object) -> str:
        """Return the key of a request: a digest of its kind and arguments."""
        return hashlib.sha256(json.dumps([kind, arguments], ensure_ascii=True).encode()).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer, on disk at once; raises RecordError when the disk does not take it."""
        self._answers[key] = answer
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": key, "answer": answer}) + "\n")
        except OSError as error:
            raise RecordError(f"{self._path}: cannot be written: {error.strerror}") from error
