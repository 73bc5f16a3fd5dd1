"""Where the cells of an experiment stand: `starquant status table1_main model=tiny`.

Overrides are those of the sweep itself. Cells that are not done are judged as the sweep would judge them, but for what
lies on a hub. Nothing is computed; the exit code is 0 when every cell is done. With --watch it is shown again every so
many seconds (2) until no cell is left that runs or is missing.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence

from starquant.errors import ConfigError, StarquantError, nearest, one_line_errors
from starquant.runs.preflight import validate_paths
from starquant.sweeps.cell_log import CellEntry, CellLog
from starquant.sweeps.cells import Plan
from starquant.sweeps.command_line import plan_of
from starquant.sweeps.overrides import CONF
from starquant.sweeps.progress import ORDER, summary

USAGE = "usage: starquant status EXPERIMENT|-m [KEY=VALUE ...] [--watch [SECONDS]]"
OPTIONS = ("-m", "--multirun")
#: Moves a terminal's cursor to its corner and clears it from there.
CLEAR = "\x1b[H\x1b[2J"
INTERRUPTED = 130
#: Between two looks at the cells.
EVERY_S, FASTEST_S = 2.0, 0.1
NUMBER = re.compile("[0-9]+([.][0-9]+)?")


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a cell and the counts; returns 1 while some are not done, 2 after bad input."""
    words, every_s = _watched(sys.argv[1:] if arguments is None else arguments)
    names = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if path.stem != "none")
    if not words or {"-h", "--help"} & {*words}:
        print(f"{__doc__}\n{USAGE}\nexperiments: {', '.join(names)}")
        return 0
    if any(word.startswith("-") and word not in OPTIONS and not word.startswith("--config-dir=") for word in words):
        raise ConfigError(USAGE)
    for place, word in enumerate(words):
        if "=" not in word and not word.startswith(("-", "~")):
            if word not in names:
                raise ConfigError(f"experiment: got '{word}', allowed: {', '.join(names)}.{nearest(word, names)}")
            words[place] = f"experiment={word}"
    plan = plan_of(words)
    assert plan is not None  # no option is left that runs nothing
    if plan.benchmark is not None:
        raise ConfigError(f"experiment: got '{plan.experiment}', a benchmark without cells; run again it goes on")
    try:
        entries = _judged(plan, _entries(plan))
        _show(entries, redrawn=every_s is not None)
        if every_s is not None:
            entries = _watch(plan, entries, every_s)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0 if all(entry.state == "done" for entry in entries) else 1


def _watched(words: Sequence[str]) -> tuple[list[str], float | None]:
    """Return the words without --watch, and its seconds; None without it."""
    rest, every_s = list[str](), None
    for before, word in zip(["", *words], words, strict=False):
        if word == "--watch":
            every_s = EVERY_S
        elif word.startswith("--watch=") or (before == "--watch" and NUMBER.fullmatch(word)):
            text = word.removeprefix("--watch=")
            if not NUMBER.fullmatch(text) or float(text) < FASTEST_S:
                raise ConfigError(f"--watch: got '{text}', allowed: seconds, {FASTEST_S:g} or more")
            every_s = float(text)
        else:
            rest.append(word)
    return rest, every_s


def _entries(plan: Plan) -> list[CellEntry]:
    log = CellLog(plan.results)
    return [log.read(cell.key, cell.name) for cell in plan.cells]


def _show(entries: Sequence[CellEntry], redrawn: bool) -> None:
    """Print a line a cell, and the counts; redrawn, a terminal is cleared first."""
    lines = [
        f"{entry.state:8s} {entry.name:55s} {entry.error or entry.record or ''}"
        for entry in sorted(entries, key=lambda e: ORDER.index(e.state))
    ]
    clear = CLEAR if redrawn and sys.stdout.isatty() else ""
    print(clear + "\n".join([*lines, summary(entries).splitlines()[0]]), flush=True)


def _watch(plan: Plan, shown: list[CellEntry], every_s: float) -> list[CellEntry]:
    """Show the cells again whenever they stand otherwise, until none runs or is missing; returns how they stand then.

    Cells that were refused at first stay so until they run: judging them takes seconds.
    """
    refused = {entry.key: entry for entry in shown if entry.state == "refused"}
    while any(entry.state in ("running", "missing") for entry in shown):
        time.sleep(every_s)
        read = _entries(plan)
        entries = [refused.get(e.key, e) if e.state not in ("running", "done") else e for e in read]
        if entries != shown:
            shown = entries
            _show(shown, redrawn=True)
    return shown


def _judged(plan: Plan, entries: Sequence[CellEntry]) -> list[CellEntry]:
    """Return the entries with those as refused that the sweep would not start; each reason once, then by a name."""
    if all(entry.state in ("done", "running") for entry in entries):
        return [*entries]
    from starquant.runs.judgement import Judge  # and torch, where cells are left to run

    judge, first, judged = Judge(here=plan.launcher == "basic", fetches=False), dict[str, str](), []
    for cell, entry in zip(plan.cells, entries, strict=True):
        if entry.state not in ("done", "running"):
            try:
                validate_paths(cell.spec)
                judge.validate(cell.spec)
            except StarquantError as error:
                why = "; ".join(str(error).splitlines())
                said = f"as {first[why]}" if why in first else why
                first.setdefault(why, entry.name)
                entry = entry.model_copy(update={"state": "refused", "error": said})
        judged.append(entry)
    return judged


if __name__ == "__main__":
    sys.exit(main())
