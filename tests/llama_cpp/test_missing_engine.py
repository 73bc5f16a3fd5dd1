"""Without llama.cpp: one error, and nothing is said behind it."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest

from starquant.errors import ConfigError
from starquant.llama_cpp import engine


def test_an_engine_that_was_never_loaded_has_nothing_to_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ConfigError("model.engine: got llama_cpp, which cannot be loaded")

    said: list[Any] = []
    monkeypatch.setattr(engine, "library", missing)
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        engine.Engine(Path("m.gguf"), 8)
    gc.collect()
    assert not said
