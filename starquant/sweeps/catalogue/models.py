"""What `model=NAME` may be, and what each is run with: a checkpoint of your own is `model=llada model.path=DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from starquant.errors import one_line_errors
from starquant.sweeps.catalogue.reading import composing, headline, listing, options, parse_nothing
from starquant.sweeps.overrides import CONF

HEADER = ("model", "checkpoint", "dtype", "tasks", "calibration", "fidelity", "prompts", "what it is")


def lines() -> list[tuple[str, ...]]:
    """Return the cells of each model, in the order of their names."""
    with composing() as compose:
        composed = {name: compose("config", [f"model={name}"]) for name in options("model")}
    return [_line(name, config) for name, config in composed.items()]


def _line(name: str, config: dict[str, Any]) -> tuple[str, ...]:
    model = config["model"]
    embedded = "built by `make smol`" if model.get("testbed") == "smol" else "in the package"
    return (
        name,
        model["path"] or embedded,
        model["dtype"],
        *(config[group]["name"] for group in ("tasks", "calibration", "fidelity")),
        "chat" if model["chat_template"] == "auto" else "text",
        headline(CONF / "model" / f"{name}.yaml"),
    )


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a model; returns 2 after bad input."""
    parse_nothing("models", __doc__ or "", arguments)
    print(listing(HEADER, lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
