"""Answers to single requests, kept on disk as they are found: a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


class ResponseLog:
    """A request-to-answer map, appended to a JSONL file answer by answer.

    Args:
        path: the file; None keeps answers in memory only. A torn last line (the run was killed while writing)
            is dropped.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._answers: dict[str, float | str] = {}
        if path is not None and path.exists():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            for line in whole.splitlines():
                entry = json.loads(line)
                self._answers[entry["key"]] = entry["answer"]
            path.write_bytes(whole)

    @staticmethod
    def key(kind: str, arguments: object) -> str:
        """Return the key of a request: a digest of its kind and arguments."""
        return hashlib.sha256(json.dumps([kind, arguments], ensure_ascii=True).encode()).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> float | str:
        return self._answers[key]

    def add(self, key: str, answer: float | str) -> None:
        """Keep an answer, on disk at once."""
        self._answers[key] = answer
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": key, "answer": answer}) + "\n")
