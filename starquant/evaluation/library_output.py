"""What lm-eval puts on the terminal itself: a bar without a name, and git's complaint outside a repository."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lm_eval.api.task as lm_eval_task
import lm_eval.evaluator as lm_eval_evaluator

from starquant.session.progress import Progress


@contextmanager
def labelled(progress: Progress, task: str) -> Iterator[None]:
    """Let lm-eval's bar over the items whose prompts it writes be one of `progress`, under the task's name.

    lm-eval does not ask git for the commit of the current folder: records have that of the code.
    """

    def bar(items: Iterable[Any], total: int | None = None, **_: Any) -> Iterable[Any]:
        drawn: Iterable[Any] = progress.bar(items, f"{task}, prompts", "item", total=total)
        return drawn

    with (
        mock.patch.object(lm_eval_task, "tqdm", bar),
        mock.patch.object(lm_eval_evaluator, "get_git_commit_hash", lambda: None),
    ):
        yield
