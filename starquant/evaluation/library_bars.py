"""lm-eval's own bar, which has no name: drawn by the run's `Progress`, under the task's name, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lm_eval.api.task as lm_eval_task

from starquant.session.progress import Progress


@contextmanager
def labelled(progress: Progress, task: str) -> Iterator[None]:
    """Let lm-eval's bar over the items whose prompts it writes be one of `progress`."""

    def bar(items: Iterable[Any], total: int | None = None, **_: Any) -> Iterable[Any]:
        drawn: Iterable[Any] = progress.bar(items, f"{task}, prompts", "item", total=total)
        return drawn

    drawn_by_lm_eval = lm_eval_task.tqdm
    lm_eval_task.tqdm = bar
    try:
        yield
    finally:
        lm_eval_task.tqdm = drawn_by_lm_eval
