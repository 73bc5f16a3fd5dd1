"""An experiment's page, beside its table."""

from __future__ import annotations

import sys
from pathlib import Path

from starquant.errors import ConfigError, RecordError
from starquant.reports.choice import Where
from starquant.reports.page.content import EXPERIMENTS, content_of
from starquant.reports.page.render import write
from starquant.reports.selection import Results


def show_page(name: str, results: Results, where: Where, path: Path) -> None:
    """Write an experiment's page and print where it lies; one that cannot be made is a note."""
    if name not in EXPERIMENTS:
        return
    try:
        write(content_of(results, name, where), path)
        print(f"wrote {path}", flush=True)
    except (ConfigError, RecordError, OSError) as error:
        print(f"note: {path} was not written: {error}", file=sys.stderr)
