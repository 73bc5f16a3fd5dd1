"""Block diffusion is calibrated behind the masks of the trajectories that it is calibrated on."""

from __future__ import annotations

import pytest

from starquant.runs.calibrate import blocks_of_trajectory
from tests.support.models import fresh, sdar
from tests.support.specs import spec


@pytest.mark.parametrize("states", ["trajectory", "uniform"])
def test_blocks_are_those_of_the_trajectory(states: str) -> None:
    model = sdar()
    own = model.block_length
    run = spec("model=tiny_sdar", "method=quarot", f"calibration.states.sampler={states}")
    assert run.model.trajectory is not None
    sampler = run.model.trajectory.model_copy(update={"block_length": 2, "steps_per_block": 2})
    run = run.model_copy(update={"model": run.model.model_copy(update={"trajectory": sampler})})
    with blocks_of_trajectory(run, model):
        assert model.block_length == (2 if states == "trajectory" else own)
    assert model.block_length == own
    with blocks_of_trajectory(run, fresh("llada_gqa")):
        pass  # a bidirectional model has none
