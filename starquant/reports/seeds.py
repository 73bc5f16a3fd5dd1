"""Seeds of runs, and the warning where a figure stands on too few of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from starquant.reports.run import Run

#: Where a method's own seed stands: of rotations, of the starts of learned matrices.
METHOD_SEEDS = ("method.rotation_seed", "method.start_seed")
FEWEST = 3  # seeds behind an interval that may speak of a method; ours


def method_seed(run: Run) -> int | None:
    """Return the seed of what a method draws; None where it draws nothing."""
    drawn = [seed for key in METHOD_SEEDS if (seed := run.get(key)) is not None]
    return drawn[0] if drawn else None


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
