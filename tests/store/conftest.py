"""What a run says is shown on stderr, as run.py shows it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from starquant.session.logs import on_terminal


@pytest.fixture(autouse=True)
def _terminal() -> Iterator[None]:
    with on_terminal():
        yield
