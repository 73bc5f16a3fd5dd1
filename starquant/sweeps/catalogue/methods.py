"""What `method=NAME` may be: bits, its authors' grid, whether it needs calibration, whether it exports, its paper."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from starquant.config.bits import AuthorsGrid
from starquant.config.methods import METHODS
from starquant.config.methods.base import MethodOptions
from starquant.config.run import RunSpec
from starquant.errors import one_line_errors
from starquant.sweeps.catalogue.reading import composing, headline, listing, options, parse_nothing
from starquant.sweeps.overrides import CONF

HEADER = ("method", "bits", "authors' grid", "calibration", "exports", "paper", "what it is")
#: Methods that quantize nothing themselves, and the bits of what they leave.
LEFT = {RunSpec.BASELINE.algorithm: "16", RunSpec.PACKED: "the checkpoint's"}


def lines() -> list[tuple[str, ...]]:
    """Return the cells of each method, in the order of their names."""
    with composing() as compose:
        composed = {name: compose(f"method/{name}", ())["method"] for name in options("method")}
    return [_line(name, _options(one)) for name, one in composed.items()]


def _options(composed: dict[str, Any]) -> MethodOptions:
    return METHODS.options(composed["algorithm"]).model_validate_json(json.dumps(composed))


def _line(name: str, method: MethodOptions) -> tuple[str, ...]:
    return (
        name,
        LEFT.get(method.algorithm, "any"),
        "-" if method.authors is None else grid(method.authors),
        "yes" if method.needs_calibration else "no",
        "no" if method.algorithm in LEFT else "yes",
        method.reference.removeprefix("arXiv ") if method.reference.startswith("arXiv") else "-",
        headline(CONF / "method" / f"{name}.yaml"),
    )


def grid(authors: AuthorsGrid) -> str:
    """Return in words what a method's authors round to beside the common grid: symmetric, unclipped."""
    asymmetric = {"W": authors.weights_symmetric, "A": authors.activations_symmetric, "KV": authors.kv_symmetric}
    clips = {"A": authors.activation_clip, "KV": authors.kv_clip}
    words = ["+".join(name for name, symmetric in asymmetric.items() if not symmetric) + " asymmetric"]
    words = [] if all(asymmetric.values()) else words
    return ", ".join([*words, *(f"{name} clip {clip:g}" for name, clip in clips.items() if clip < 1.0)])


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a method; returns 2 after bad input."""
    parse_nothing("methods", __doc__ or "", arguments)
    print(listing(HEADER, lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
