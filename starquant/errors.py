"""The errors a user can cause. Anything else that is raised is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StarquantError(Exception):
    """Root of every error whose message is meant for the user, printed without a traceback."""


class ConfigError(StarquantError):
    """A value of the run's configuration is not allowed; the message names its dotted path."""


class CheckpointError(StarquantError):
    """A checkpoint folder or file cannot be used; the message names the file or parameter."""


class DeviceError(StarquantError):
    """A device cannot do what is asked of it: too little memory."""


class DataError(StarquantError):
    """A data file is missing, malformed or lacks a field; the message names file and line."""


class ConsentError(StarquantError):
    """An action that needs the user's explicit consent (running model-written code) has none."""


class RecordError(StarquantError):
    """A run record cannot be read or written; the message names the file."""


def nearest(got: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the allowed name closest to `got`, or an empty string."""
    match = difflib.get_close_matches(got, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


class NewerRecordError(RecordError):
    """A record or artifact that a later version of this code has written; it is left alone."""
