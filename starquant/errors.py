"""The errors a user can cause. Anything else that is raised is a bug and keeps its traceback."""

from __future__ import annotations

import argparse
import difflib
import functools
import io
import os
import select
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TextIO

P = ParamSpec("P")


class StarquantError(Exception):
    """Root of every error whose message is meant for the user, printed without a traceback.

    Attributes:
        refused: a run has raised it before it computed anything.
    """

    refused: bool = False


class ConfigError(StarquantError):
    """A value of the run's configuration is not allowed; the message names its dotted path."""


class CheckpointError(StarquantError):
    """A checkpoint folder or file cannot be used; the message names the file or parameter."""


class DeviceError(StarquantError):
    """A device cannot do what is asked of it: too little memory."""


class NonFiniteError(StarquantError):
    """A forward pass gives values that are not finite; the message names the first block that does."""


class DataError(StarquantError):
    """A data file is missing, malformed or lacks a field; the message names file and line."""


class ConsentError(StarquantError):
    """An action that needs the user's explicit consent (running model-written code) has none."""


class RecordError(StarquantError):
    """A run record cannot be read or written; the message names the file."""


class NewerRecordError(RecordError):
    """A record or artifact that a later version of this code has written; it is left alone."""


def expand_home(path: str) -> str:
    """Return a path of the user with `~` as his home; raises ValueError for what no file can be called."""
    if not path or "\0" in path:
        raise ValueError(f"got {path!r}, allowed: a path")
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ValueError(f"got {path!r}, but that home is not known; allowed: a path, ./~ for a folder of that name")
    return expanded


def user_path(text: str) -> Path:
    """Return a path from a command line: what argparse takes as `type`."""
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_of(word: str, where: str) -> Path:
    """Return a path that a word of a command, `where`, may be beside a name; raises ConfigError."""
    try:
        return Path(expand_home(word))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


class CommandParser(argparse.ArgumentParser):
    """Words of a command; what it cannot read is one line with the nearest name: ConfigError, no usage, no exit."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all words; raises ConfigError."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = sorted(name for name in self._option_string_actions if name.startswith("--"))
            allowed = f"; allowed: {', '.join(known)}.{nearest(unknown[0], known)}" if unknown[0][:1] == "-" else ""
            raise ConfigError(f"{self.prog}: {unknown[0]}: not understood{allowed}")
        return options

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's own words."""
        raise ConfigError(f"{self.prog}: {message.removeprefix('argument ')}")


def one_of(allowed: Iterable[str]) -> Callable[[str], str]:
    """Return what argparse takes as `type` where a word is one of some names; others are told the nearest."""
    names = [*allowed]

    def name(word: str) -> str:
        if word not in names:
            raise argparse.ArgumentTypeError(f"got '{word}', allowed: {', '.join(names)}.{nearest(word, names)}")
        return word

    return name


def nearest(got: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the allowed name closest to `got`, or an empty string."""
    match = difflib.get_close_matches(got, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def make_printable() -> None:
    """Let a terminal that lacks a character show its escape: an ASCII one would end a run with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show_error(error: BaseException) -> None:
    """Print an error on stderr, a line a fault; one of the system as the file and what is wrong with it."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        text = f"{error.filename}: {error.strerror}"
    for line in text.splitlines() or [type(error).__name__]:
        print(f"error: {line}", file=sys.stderr, flush=True)


def ended(command: Callable[[], int]) -> int:
    """Return the exit code of a command: 130 where Ctrl-C ends it, 141 where nobody reads its output any longer.

    Raises:
        BrokenPipeError: of another pipe than its output, which is a bug.
    """
    try:
        try:
            code = command()
        except SystemExit:  # --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # else the interpreter tells of a closed pipe when it ends
        return code
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr, flush=True)
        return 143 if error.args else 130
    except BrokenPipeError:
        closed = [descriptor for descriptor in map(_descriptor, (sys.stdout, sys.stderr)) if _is_closed(descriptor)]
        if not closed:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in closed:  # what is left in a buffer goes there
            os.dup2(nowhere, descriptor)
        return 141


def _descriptor(stream: TextIO) -> int:
    """Return the number of a stream, -1 for one in memory."""
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return -1


def _is_closed(descriptor: int) -> bool:
    """Return whether a pipe has nobody at its other end."""
    if descriptor < 0:
        return False
    watched = select.poll()
    watched.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))


def one_line_errors(*also: type[Exception]) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Let a command's `main` end with one line on stderr and exit code 2 after an error of the user, else as `ended`.

    Args:
        also: errors that are the user's in this command: OSError where it writes to a place that he names.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
            make_printable()
            return ended(lambda: one_line(*args, **kwargs))

        def one_line(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except BrokenPipeError:  # an OSError
                raise
            except (StarquantError, *also) as error:
                show_error(error)
                return 2

        return wrapped

    return decorate
