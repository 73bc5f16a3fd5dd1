"""Shared fixtures. Everything runs on the CPU and without a network."""

from __future__ import annotations

import functools
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # threads of several processes on few cores stop each other

import pytest
import torch
from torch.utils import collect_env

from starquant.models import load_model, load_tokenizer
from starquant.models.base import MaskedDiffusionModel
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.compositions import read_files_once
from tests.support.paths import FAMILIES, GOLDEN, REPOSITORY

# lm-eval asks pip for it at every evaluation, which takes longer than small evaluations do.
collect_env.get_env_info = functools.cache(collect_env.get_env_info)
read_files_once()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Name of a golden fixture: LLaDA with MHA, Dream with GQA."""
    return request.param


@pytest.fixture
def golden_model(family: str) -> MaskedDiffusionModel:
    """A fresh model of the family, safe to quantize in place."""
    return load_model(GOLDEN / family)


@pytest.fixture(scope="session")
def tiny() -> MaskedDiffusionModel:
    """The embedded model; shared, so tests must not change it."""
    return load_model(weights_folder(0))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The embedded model's tokenizer."""
    return load_tokenizer(weights_folder(0))


@pytest.fixture
def benchmark_data() -> Path:
    """Real benchmark items, where they lie beside the checkout or under STARQUANT_DATA."""
    candidates = [os.environ.get("STARQUANT_DATA"), REPOSITORY.parent / "shared" / "data"]
    for candidate in candidates:
        if candidate and Path(candidate).is_dir():
            return Path(candidate)
    pytest.skip("no benchmark data here (set STARQUANT_DATA)")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
