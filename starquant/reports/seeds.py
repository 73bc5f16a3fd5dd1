"""Seeds of runs, and the warning where a figure stands on too few of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from starquant.reports.run import Run

FEWEST = 3  # seeds behind an interval that may speak of a method; ours


def method_seed(run: Run) -> int | None:
    """Return the seed of what a method draws (rotations, starts of learned matrices); None where it draws nothing."""
    drawn: int | None = run.get("method.rotation_seed")
    return run.get("method.start_seed") if drawn is None else drawn


def seeds_of(run: Run) -> tuple[int | None, int | None, int | None]:
    """Return the seeds of the model, of the method and of the evaluation."""
    return run.get("model.seed"), method_seed(run), run.get("seed")


def warning(rows: Iterable[tuple[str, Collection[int | None]]]) -> str | None:
    """Return a sentence that names the rows of fewer method seeds than `FEWEST`; None where there are none.

    Args:
        rows: label and method seeds of each.
    """
    few = {}
    for label, seeds in rows:
        drawn = {seed for seed in seeds if seed is not None}
        if 0 < len(drawn) < FEWEST:
            few[label] = len(drawn)
    if not few:
        return None
    named = ", ".join(f"{label} ({n})" for label, n in few.items())
    return f"Fewer than {FEWEST} seeds of the method, so that intervals say little of the noise between seeds: {named}."
