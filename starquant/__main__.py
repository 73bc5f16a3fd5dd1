"""`starquant COMMAND ...`, or `python -m starquant COMMAND ...`: every command; `python run.py` is `starquant run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from starquant import __version__
from starquant.commands import COMMANDS

#: Commands of their own modules.
ALSO = (
    "also, each with --help:",
    "  python -m starquant.reports.{comparison,across_seeds,efficiency,figures}",
    "  python -m starquant.testbed.tiny.train",
    "  python -m starquant.testbed.smol.{build,training,tasks.items,tasks.baselines}",
)


def usage() -> str:
    """Return a line a command."""
    lines = [f"  {name:12s}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: starquant COMMAND ...", *lines, "COMMAND --help says more; --version.", *ALSO])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; 2 after an unknown one, 130 after Ctrl-C, 141 when nobody reads."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from starquant.errors import ended  # here: Ctrl-C may come while modules are imported

        return ended(lambda: _command(words))
    except KeyboardInterrupt:
        return 130


def _command(words: list[str]) -> int:
    import os
    import tempfile
    from importlib import import_module

    from starquant.errors import make_printable, nearest
    from starquant.session.terminal import silence_libraries

    make_printable()
    if not words or words in (["-h"], ["--help"], ["help"]):
        print(usage())
        return 0
    if words in (["--version"], ["-V"]):
        print(f"starquant {__version__}")
        return 0
    first = words[0]
    if first in COMMANDS:
        words = words[1:]
    elif "=" in first or first.startswith(("-", "~")):
        first = "run"
    else:
        print(
            f"error: {first}: unknown command; allowed: {', '.join(COMMANDS)}.{nearest(first, COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    try:
        os.getcwd()
    except OSError:
        print("error: the folder that this command runs in is gone; cd to one that is there", file=sys.stderr)
        return 2
    if first in ("run", "evaluate"):  # the others need none
        try:
            tempfile.gettempdir()
        except OSError:
            print("error: TMPDIR: no folder for temporary files can be written; name one that can", file=sys.stderr)
            return 2
    silence_libraries()
    code: int = import_module(COMMANDS[first][0]).main(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
