"""What a tracker hears of a run under way, beside counts and losses: its stage, the SQNR by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

from starquant.runs.timing import timed
from starquant.session.progress import Progress
from starquant.store.manifest import ManifestEntry


@contextmanager
def stage(seconds: dict[str, float], name: str, progress: Progress) -> Iterator[None]:
    """Tell the stage, and put the seconds that it takes under its name."""
    progress.tell({"stage": name})
    with timed(seconds, name):
        yield


def sqnr_by_block(manifest: Sequence[ManifestEntry]) -> Iterator[dict[str, float]]:
    """Yield, block by block, the mean SQNR in dB of its weights, of what sites read, and of attention operands."""
    for block in sorted({entry.block for entry in manifest if entry.block is not None}):
        own = [entry for entry in manifest if entry.block == block]
        parts = {
            "weights": [entry.weight_sqnr_db for entry in own],
            "activations": [*{e.site: e.activation_sqnr_db for e in own if e.kind == "linear"}.values()],
            "attention": [entry.activation_sqnr_db for entry in own if entry.kind == "operand"],
        }
        measured = {name: [value for value in values if value is not None] for name, values in parts.items()}
        figures = {f"sqnr_db/{name}": fmean(values) for name, values in measured.items() if values}
        if figures:
            yield {"block": block, **figures}
