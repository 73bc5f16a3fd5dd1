"""The page of an experiment, beside its table, and that of a run or of a sweep that is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from starquant.errors import ConfigError, RecordError
from starquant.reports.choice import Where
from starquant.reports.page.content import EXPERIMENTS, Content, content_of
from starquant.reports.page.render import write
from starquant.reports.selection import Results, without_collection
from starquant.store.records import twin_of

#: Where pages lie, below their results.
PAGES = "pages"


def show_page(name: str, results: Results, where: Where, path: Path) -> None:
    """Write an experiment's page and print where it lies; one that cannot be made is a note."""
    if name in EXPERIMENTS:
        _show(lambda: content_of(results, name, where), path)


def show_runs(records: Sequence[Path], results: Path, name: str) -> None:
    """Write the page of some runs beside full precision and print where it lies; one that cannot be made is a note.

    Args:
        records: of the runs, in one folder.
        results: their folder.
        name: of the page, and its title.
    """

    def content() -> Content:
        twins = [twin for record in records if (twin := twin_of(record)) is not None]
        names = list(dict.fromkeys(path.name for path in (*records, *twins)))
        return content_of(Results(records[0].parent, names), title=name)

    _show(content, results / PAGES / f"{name}.html")


def _show(content: Callable[[], Content], path: Path) -> None:
    try:
        with without_collection():
            write(content(), path)
        print(f"wrote {path}", flush=True)
    except (ConfigError, RecordError, OSError) as error:
        print(f"note: {path} was not written: {error}", file=sys.stderr)
