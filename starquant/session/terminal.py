"""Who watches: what a person at a terminal gets and a log does not."""

from __future__ import annotations

import os
import sys

#: Value of TQDM_DISABLE that silences the bars of libraries and leaves our lines; a user's own silences both.
LIBRARIES = "libraries"


def interactive() -> bool:
    """Return whether a person watches stderr: it is a terminal, and no CI's."""
    return sys.stderr.isatty() and not os.environ.get("CI")


def silence_libraries() -> None:
    """Let libraries draw no bars where nobody watches; before tqdm is imported, which reads it then."""
    if not interactive():
        os.environ.setdefault("TQDM_DISABLE", LIBRARIES)


def quiet() -> bool:
    """Return whether TQDM_DISABLE is set: neither bars nor lines are wanted."""
    return os.environ.get("TQDM_DISABLE", LIBRARIES) not in ("", "0", LIBRARIES)
