"""Progress: the one place that decides whether it is drawn, said in lines, told to a tracker, or none of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from starquant.session.terminal import interactive, quiet

T = TypeVar("T")
#: Hears figures of a run under way, by name.
Hear = Callable[[Mapping[str, float | str]], None]

#: Between two lines of a bar in a log, and before the first one.
LINE_S = 60.0
#: How many losses of one optimisation are told at most.
MOST_LOSSES = 20


class _Bar(tqdm):
    """A bar that tells how much is done whenever it is updated, drawn or not."""

    def __init__(self, *arguments: Any, tell: Callable[[float], None], **options: Any) -> None:
        self._tell, self._done = tell, options.get("initial", 0)
        super().__init__(*arguments, **options)

    def update(self, n: float | None = 1) -> bool | None:
        """Move on."""
        self._done += 1 if n is None else n
        self._tell(self._done)
        drawn: bool | None = super().update(n)
        return drawn


class _Lines(_Bar):
    """A bar as lines, for a log: one a minute, none of what takes less."""

    disable: bool

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, delay=LINE_S, mininterval=LINE_S, miniters=1)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print how it stands."""
        rate = self.format_dict
        done = f"{rate['n']} of {rate['total']}" if rate["total"] else f"{rate['n']}"
        line = f"{self.desc.removesuffix(': ')}: {done} {self.unit}s in {self.format_interval(rate['elapsed'])}"
        if rate["total"] and rate["n"] > rate["initial"]:
            left = rate["elapsed"] * (rate["total"] - rate["n"]) / (rate["n"] - rate["initial"])
            line += f", {self.format_interval(left)} left"
        print(line, file=self.fp, flush=True)
        return True

    def close(self) -> None:
        """End without a line."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


@dataclass(frozen=True)
class Progress:
    """Draws bars on stderr, or none.

    Attributes:
        shown: whether anything is seen.
        plain: sparse lines stand in place of bars.
        hear: is told figures of the run, whether bars are drawn or not; None hears nothing.
    """

    shown: bool = True
    plain: bool = False
    hear: Hear | None = None

    def bar(
        self,
        iterable: Iterable[T] | None,
        what: str,
        unit: str,
        total: int | None = None,
        initial: int = 0,
        counted: bool = False,
    ) -> tqdm[T]:
        """Return a bar that is gone when it is finished.

        Args:
            iterable: what is counted as it is iterated over; None where `update` is called instead.
            what: is under way.
            unit: of the count.
            total: of the count; None takes the iterable's length.
            initial: what of the count was there already.
            counted: `hear` is told the count with each `update`, as UNITs/WHAT.
        """

        def tell(done: float) -> None:
            if counted:
                self.tell({f"{unit}s/{what}": done})

        kind = _Lines if self.plain else _Bar
        options: dict[str, Any] = {"unit": unit, "total": total, "initial": initial, "leave": False}
        bar: tqdm[T] = kind(iterable, desc=what, disable=not self.shown, tell=tell, **options)
        return bar

    def tell(self, figures: Mapping[str, float | str]) -> None:
        """Tell figures of the run to who hears them."""
        if self.hear is not None:
            self.hear(figures)

    def tell_loss(self, site: str, block: int | None, step: int, steps: int, loss: Callable[[], float]) -> None:
        """Tell the loss of a transform that is learned, at `MOST_LOSSES` of its steps.

        Args:
            site: that the transform stands at.
            block: its index; None for all blocks.
            step: of the optimisation, from 0.
            steps: of the optimisation.
            loss: is read only where somebody hears it: on a GPU that waits for the step.
        """
        if self.hear is not None and (step + 1) % max(1, steps // MOST_LOSSES) == 0:
            self.tell({"block": (block or 0) + (step + 1) / steps, f"loss/{site}": loss()})


#: Draws nothing: what library functions are called with.
SILENT = Progress(shown=False)


def for_terminal() -> Progress:
    """Return bars where a person watches, lines where none does, nothing where TQDM_DISABLE is set."""
    return Progress(shown=not quiet(), plain=not interactive())
