"""Who watches: what a person at a terminal gets and a log does not."""

from __future__ import annotations

import os
import sys


def interactive() -> bool:
    """Return whether a person watches stderr: it is a terminal, and no CI's."""
    return sys.stderr.isatty() and not os.environ.get("CI")
