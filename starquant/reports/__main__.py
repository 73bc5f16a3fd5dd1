"""Tables and figures of the paper's experiments, from records.

starquant tables table1_main                            of results/, to results/tables/
starquant tables figure3_trajectory --records results/published/figure3_trajectory --out OUT
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from starquant.errors import CommandParser, ConfigError, one_line_errors, one_of, user_path
from starquant.reports.choice import conditions
from starquant.reports.experiments import NAMES, build
from starquant.reports.selection import ALLOWED, Results, without_collection


@one_line_errors(OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Write what is asked for and print the paths; returns 2 after bad input, records that are left out among it."""
    parser = CommandParser(
        prog="starquant tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="+", help=f"any of {', '.join(NAMES)}")
    parser.add_argument("--records", type=user_path, default=Path("results"), help="results folder (default: results)")
    parser.add_argument(
        "--out", type=user_path, help="where tables/ and figures/ are written (default: the results folder)"
    )
    allowed = "; ".join(f"{name}: {what}" for name, what in ALLOWED.items())
    parser.add_argument("--allow", nargs="+", default=[], type=one_of(ALLOWED), help=allowed)
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only records that have this; tasks.limit=N takes those of N items, which are left out otherwise",
    )
    options = parser.parse_args(arguments)
    where = conditions(options.where)
    out = options.out or options.records
    if options.out is not None and not next(path for path in (out, *out.parents) if path.exists()).is_dir():
        raise ConfigError(f"--out: {out}: is a file, or below one; allowed: a folder")
    with without_collection():
        results = Results(options.records)
        paths = [build(name, results, out, options.allow, where) for name in options.name]
    print("\n".join(str(path) for built in paths for path in built))
    if results.unsealed:
        print(
            f"note: {results.unsealed} of {len(results.runs)} records in {results} were written without a seal: they "
            "agree with those items that they have, and beyond that cannot be verified",
            file=sys.stderr,
        )
    return 2 if results.faults else 0


if __name__ == "__main__":
    sys.exit(main())
