"""Answers to single requests, kept on disk as they are found: a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from starquant.errors import RecordError
from starquant.store.files import write_atomically

log = logging.getLogger(__name__)

#: A log-likelihood, two estimates of one, or a text.
Answer = float | list[float] | str


class ResponseLog:
    """A request-to-answer map, appended to a JSONL file answer by answer.

    Every line has a digest of its place (the run's folders and the task), key and answer. A line that is not what was
    written is set aside, by itself, in `NAME.jsonl.damaged`, and computed again.

    Args:
        path: the file, `DIGEST/CODE/TASK.jsonl`; None keeps answers in memory only. A last line without its end (the
            run was killed while writing) is dropped.
        rank: of the process; all but the first write to files of their own beside it, and every process reads all,
            so that a run may go on with another number of processes.
    """

    def __init__(self, path: Path | None, rank: int = 0) -> None:
        self._answers: dict[str, Answer] = {}
        self._path = path if path is None or rank == 0 else path.with_suffix(f".rank{rank}.jsonl")
        if path is None:
            return
        self._place = "/".join((*path.parts[-3:-1], path.stem))
        for file in sorted(path.parent.glob(f"{path.stem}*.jsonl")):
            if file == self._path:
                self._take_over(file)
            elif file == path or file.name.startswith(f"{path.stem}.rank"):
                self._read(file)

    def _take_over(self, path: Path) -> None:
        """Read the file that this process goes on writing, and leave nothing in it but whole lines."""
        sound, damaged, torn = self._read(path)
        if damaged:
            aside = path.with_name(f"{path.name}.damaged")
            numbers = ", ".join(map(str, damaged))
            try:
                with aside.open("ab") as stream:
                    stream.write(b"".join(damaged.values()))
                write_atomically(path, b"".join(sound).decode())
            except OSError as error:
                raise RecordError(f"{path}: cannot be written: {error.strerror}") from error
            log.warning(
                "%s: not what was written in line %s; set aside in %s and computed again", path, numbers, aside.name
            )
        elif torn:
            with path.open("r+b") as stream:
                stream.truncate(sum(map(len, sound)))

    def _read(self, path: Path) -> tuple[list[bytes], dict[int, bytes], bool]:
        """Keep the answers of a file; return its sound lines, those that are not, by number, and if the last is torn.

        Raises:
            RecordError: it cannot be read.
        """
        try:
            lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        except OSError as error:
            raise RecordError(f"{path}: cannot be read: {error.strerror}") from error
        torn = bool(lines) and not lines[-1].endswith(b"\n")
        sound, damaged = [], {}
        for number, line in enumerate(lines[:-1] if torn else lines, 1):
            try:
                entry = json.loads(line.decode())
                intact = entry == self._entry(entry["key"], entry["answer"])
            except (ValueError, TypeError, KeyError, RecursionError):
                intact = False
            if intact:
                self._answers[entry["key"]] = entry["answer"]
                sound.append(line)
            else:
                damaged[number] = line
        return sound, damaged, torn

    def _entry(self, key: str, answer: Answer) -> dict[str, Answer]:
        """Return an answer as it is written, with its digest."""
        content = json.dumps([self._place, key, answer])
        return {"key": key, "answer": answer, "sha256": hashlib.sha256(content.encode()).hexdigest()[:32]}

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
                stream.write(json.dumps(self._entry(key, answer)) + "\n")
        except OSError as error:
            raise RecordError(f"{self._path}: cannot be written: {error.strerror}") from error
