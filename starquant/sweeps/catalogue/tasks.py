"""What `tasks=NAME` may be; single tasks are `tasks.names=[piqa,gsm8k]`, those that the model has a protocol for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from starquant.config.tasks import EXECUTES_CODE, TasksSpec
from starquant.errors import one_line_errors
from starquant.sweeps.catalogue.reading import composing, headline, listing, options, parse_nothing
from starquant.sweeps.overrides import CONF

HEADER = ("suite", "items from", "needs consent", "what it is", "tasks")


def lines() -> list[tuple[str, ...]]:
    """Return the cells of each suite, in the order of their names."""
    with composing() as compose:
        composed = {name: compose(f"tasks/{name}", ())["tasks"] for name in options("tasks")}
    cells: list[tuple[str, ...]] = []
    for name, one in composed.items():
        tasks = TasksSpec.model_validate(one | {"names": tuple(one["names"])})
        needing = ", ".join(task for task in tasks.names if task in EXECUTES_CODE) or "-"
        source = "the package" if tasks.is_shipped else "the hub, or tasks.data_dir"
        cells.append((name, source, needing, headline(CONF / "tasks" / f"{name}.yaml"), " ".join(tasks.names) or "-"))
    return cells


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a suite; returns 2 after bad input."""
    parse_nothing("tasks", __doc__ or "", arguments)
    print(listing(HEADER, lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
