"""What `stage=inspect` says of a model of block diffusion: every token state it has, and SGAT's two groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from starquant.calibration.batches import Segment
from starquant.calibration.masked_states import make_states
from starquant.calibration.site_statistics import LEAST_EDITED
from starquant.config.calibration import CalibrationSpec, StatesSpec
from starquant.diffusion import SDARSampler
from starquant.evaluation.activations import report
from starquant.reports import figures
from starquant.reports.activations import render
from starquant.reports.page.activations import densities
from tests.support.models import fresh


@pytest.mark.parametrize(("architecture", "segments"), [("sdar", 12), ("llada2", 12), ("llada2", 160)])
def test_every_state_is_reported(architecture: str, segments: int, tmp_path: Path) -> None:
    generator, model = torch.Generator().manual_seed(0), fresh(architecture)
    texts = [Segment(tuple(torch.randint(0, 110, (16,), generator=generator).tolist()), 0, "") for _ in range(segments)]
    states = make_states(
        texts, CalibrationSpec(name="test", states=StatesSpec(sampler="uniform")), model, SDARSampler(8, 4)
    )
    found = report(model, states, {"name": architecture})
    counts = dict(zip((state.value for state in model.states), states.tokens(model), strict=True))
    if counts.get("edited", LEAST_EDITED) < LEAST_EDITED:
        del counts["edited"]
    assert ("edited" in counts) == (architecture == "llada2" and segments > 12)
    for row in (row for row in found["rows"] if "expert" not in row["site"]):
        assert {name: row[name]["tokens"] for name in counts} == counts
        assert "unmasked" not in row
        assert 0 <= row["overlap"] <= 1
        idle, width = row["idle_directions"], row["width"]
        assert all(0 <= idle[name] <= width for name in ("masked", "unmasked", "both"))
    folder = tmp_path / "activations"
    folder.mkdir()
    path = folder / "one.json"
    path.write_text(json.dumps(found))
    text = render(path)
    assert "m masked, c committed" in text
    assert "x context tokens; u all that are not masked" in text
    assert len(figures.activations(figures.read_report(path), "down_input").axes[0].patches) == len(counts)
    assert {point["state"] for point in densities(tmp_path)} == {*counts}
