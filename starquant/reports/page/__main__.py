"""Records as one HTML page: `starquant report [EXPERIMENT|FOLDER] --out FILE.html`.

    starquant report                                       of results/, to results/report.html
    starquant report table1_main --where tasks.limit=64    an experiment's rows, by its labels
    starquant report results/published/testbed_methods --out methods.html

It opens from disk and fetches nothing. Charts need `pip install 'starquant[report]'` and make the file 0.9 MB larger.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from starquant.errors import CommandParser, ConfigError, nearest, one_line_errors, path_of, user_path
from starquant.reports.choice import conditions
from starquant.reports.page.content import EXPERIMENTS, content_of
from starquant.reports.page.render import write
from starquant.reports.selection import Results, without_collection


@one_line_errors(OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print its path and size; returns 2 after bad input, records that are left out among it."""
    parser = CommandParser(
        prog="starquant report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", help=f"{', '.join(EXPERIMENTS)}, or a folder of records (default: results)")
    parser.add_argument("--records", type=user_path, default=Path("results"), help="results folder of an experiment")
    parser.add_argument("--out", type=user_path, help="the file (default: report.html in the folder of records)")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only records that have this")
    options = parser.parse_args(arguments)
    experiment, folder = _chosen(options.what, options.records)
    out = options.out or folder / (f"{experiment}.html" if experiment else "report.html")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: {out.parent} is no folder")
    if out.is_dir():
        raise ConfigError(f"--out: {out}: is a folder; allowed: a file, such as {out / 'report.html'}")
    with without_collection():
        results = Results(folder)
        size = write(content_of(results, experiment, conditions(options.where)), out)
    print(f"{out} ({size / 1e6:.1f} MB)")
    return 2 if results.faults else 0


def _chosen(what: str | None, records: Path) -> tuple[str | None, Path]:
    """Return the experiment, if any, and the folder of records; raises ConfigError for a word that is neither."""
    if what is None:
        return None, records
    if what in EXPERIMENTS:
        return what, records
    folder = path_of(what, "report")
    if not folder.is_dir():
        raise ConfigError(
            f"report: got '{what}', allowed: a folder, {', '.join(EXPERIMENTS)}.{nearest(what, EXPERIMENTS)}"
        )
    return None, folder


if __name__ == "__main__":
    sys.exit(main())
