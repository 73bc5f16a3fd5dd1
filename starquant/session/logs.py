"""Logging: what a user waits for and warnings on the terminal, everything in a file.

Modules say what they have to say to `logging.getLogger(__name__)`: INFO is shown as it is, WARNING and above with the
level in front, DEBUG goes to the file only. Without a handler the package is silent but for warnings.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from starquant.errors import RecordError

#: The logger above every module's own.
PACKAGE = "starquant"
LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
#: `extra` of a line that the terminal shows by other means.
FILE_ONLY: Mapping[str, bool] = {"file_only": True}


class _Terminal(logging.Handler):
    """Lines on stderr, whatever stderr is by then."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        print(f"{level}{record.getMessage()}", file=sys.stderr, flush=True)


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger(PACKAGE)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


@contextmanager
def on_terminal(shown: bool = True) -> Iterator[None]:
    """Show the package's log on stderr; handlers of the root logger do not repeat it. Nested, it shows lines once.

    Args:
        shown: False shows nothing, not even warnings: of several processes, all but the first.
    """
    logger = logging.getLogger(PACKAGE)
    if any(isinstance(handler, _Terminal | logging.NullHandler) for handler in logger.handlers):
        yield
        return
    repeated, logger.propagate = logger.propagate, False
    try:
        with _attached(_Terminal() if shown else logging.NullHandler()):
            yield
    finally:
        logger.propagate = repeated


@contextmanager
def in_file(path: Path | None) -> Iterator[None]:
    """Append the package's log to a file: time, level, module, line.

    Args:
        path: of the file; None writes none.

    Raises:
        RecordError: the file cannot be written.
    """
    if path is None:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{path}: cannot be written: {error.strerror or error}") from error
    handler.setFormatter(logging.Formatter(LINE))
    with _attached(handler):
        yield
