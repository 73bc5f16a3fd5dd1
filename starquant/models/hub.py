"""The hub: where what is fetched is kept, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from starquant.store.cache import is_writable


def cache_fault() -> str:
    """Return what an error of the hub says of the folder that its files are kept in; nothing where that is fine."""
    folder = constants.HF_HUB_CACHE
    if folder.startswith("~"):
        return ". HF_HOME: not set, and no home folder is known; set it to a folder"
    if not is_writable(Path(folder)):
        return f". {folder} cannot be written; set HF_HOME to a folder that can"
    return ""


@contextmanager
def silent_retries() -> Iterator[None]:
    """Leave it to the error to say that the hub cannot be reached, not to two lines a try."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
