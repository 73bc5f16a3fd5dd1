"""Fixtures of the tests of methods."""

from __future__ import annotations

import pytest
from torch import Tensor

from starquant.models.base import MaskedDiffusionModel
from tests.support.states import inputs_of, tiny_states


@pytest.fixture(scope="session")
def held_out(tiny: MaskedDiffusionModel, tiny_tokenizer: object) -> dict[str, Tensor]:
    """What every linear of the embedded model reads on validation items."""
    return inputs_of(tiny, tiny_states(tiny, tiny_tokenizer, "validation", 48))
