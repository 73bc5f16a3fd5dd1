"""Where the cells of an experiment stand: `python -m starquant.sweeps.status table1_main model=tiny`.

Overrides are those of the sweep itself. Nothing is computed; the exit code is 0 when every cell is done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from starquant.errors import ConfigError, StarquantError, nearest
from starquant.sweeps.cell_log import CellLog
from starquant.sweeps.cells import CONF, NO_RUN, SHOW, plan
from starquant.sweeps.progress import ORDER, summary

USAGE = "usage: python -m starquant.sweeps.status EXPERIMENT|-m [KEY=VALUE ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a cell and the counts; returns 1 while some are not done, 2 after bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    names = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if path.stem != "none")
    if not given or {"-h", "--help"} & {*given}:
        print(f"{__doc__}\n{USAGE}\nexperiments: {', '.join(names)}")
        return 0
    try:
        if {word.split("=", 1)[0] for word in given} & (NO_RUN | SHOW):
            raise ConfigError(USAGE)
        for place, word in enumerate(given):
            if "=" not in word and not word.startswith(("-", "~")):
                if word not in names:
                    raise ConfigError(f"experiment: got '{word}', allowed: {', '.join(names)}.{nearest(word, names)}")
                given[place] = f"experiment={word}"
        planned = plan(given)
        assert planned is not None
        log = CellLog(Path(planned.cells[0].spec.paths.results))
        entries = [log.read(cell.key, cell.name) for cell in planned.cells]
    except StarquantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for entry in sorted(entries, key=lambda e: ORDER.index(e.state)):
        told = entry.error or entry.record or ""
        print(f"{entry.state:8s} {entry.name:55s} {told}")
    print(summary(entries).splitlines()[0])
    return 0 if all(entry.state == "done" for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
