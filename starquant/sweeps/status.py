"""Where the cells of an experiment stand: `starquant status table1_main model=tiny`.

Overrides are those of the sweep itself. Cells that are not done are judged as the sweep would judge them, but for what
lies on a hub. Nothing is computed; the exit code is 0 when every cell is done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from starquant.errors import ConfigError, StarquantError, nearest, one_line_errors
from starquant.runs.preflight import validate_paths
from starquant.sweeps.cell_log import CellEntry, CellLog
from starquant.sweeps.cells import Plan
from starquant.sweeps.command_line import plan_of
from starquant.sweeps.overrides import CONF
from starquant.sweeps.progress import ORDER, summary

USAGE = "usage: starquant status EXPERIMENT|-m [KEY=VALUE ...]"
OPTIONS = ("-m", "--multirun")


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a cell and the counts; returns 1 while some are not done, 2 after bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
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
    log = CellLog(plan.results)
    entries = _judged(plan, [log.read(cell.key, cell.name) for cell in plan.cells])
    for entry in sorted(entries, key=lambda e: ORDER.index(e.state)):
        print(f"{entry.state:8s} {entry.name:55s} {entry.error or entry.record or ''}")
    print(summary(entries).splitlines()[0])
    return 0 if all(entry.state == "done" for entry in entries) else 1


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
