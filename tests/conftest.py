"""Shared fixtures. Everything runs on the CPU and without a network."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # threads of several processes on few cores stop each other

import numpy as np
import pytest
import torch

from starquant.models import load_model, load_tokenizer
from starquant.models.base import MaskedDiffusionModel
from starquant.testbed.shipped import weights_folder

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).parent.parent
FAMILIES = ("llada_mha", "dream_gqa")


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """The reference outputs of one fixture (see tests/golden/README.md)."""
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return {key: arrays[key] for key in arrays}


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
