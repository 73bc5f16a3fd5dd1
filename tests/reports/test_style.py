"""The look of figures: told apart in grey, terms and no keys, histograms as their bins, channels as points."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.text import Text

from starquant.evaluation.trajectory_metrics import METRICS as MEASURED
from starquant.models.roles import Site
from starquant.reports import figures
from starquant.reports.experiments import reports, trajectory_figure
from starquant.reports.style import METRICS, SITES, ShownFigure, bits_term, colour, look
from tests.support.paths import REPOSITORY

PUBLISHED = REPOSITORY / "results" / "published"


def grey(name: str) -> float:
    """What a printer makes of a colour (Rec. 709 luma)."""
    return float(np.dot(to_rgb(name), (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_lines_are_told_apart_in_grey_and_by_more_than_colour(count: int) -> None:
    shades = [grey(colour(i, count)) for i in range(count)]
    assert all(later - before > 0.12 for before, later in itertools.pairwise(shades))
    assert shades[-1] < 0.75  # visible on white
    kinds = [(str(look(i, 6)["linestyle"]), look(i, 6)["marker"]) for i in range(6)]
    assert len({dash for dash, _ in kinds}) == len({marker for _, marker in kinds}) == 6


def words(figure: Figure) -> set[str]:
    figure.canvas.draw()
    return {text.get_text() for text in figure.findobj(Text) if text.get_text()}


@pytest.fixture(scope="module")
def activations() -> Figure:
    return figures.activations(reports(PUBLISHED / "experiments_tiny")[0], "qkv_input")


def test_axes_and_legends_have_terms_and_units(activations: Figure) -> None:
    drawn = words(activations) | words(trajectory_figure(PUBLISHED / "figure3_trajectory"))
    assert not [word for word in drawn if re.search("[a-z]_[a-z]", word)]  # no key of a record
    assert {"Input of the query, key and value projections", "[MASK] tokens", "denoising step"} <= drawn
    assert {*METRICS} >= {*MEASURED} - {"same_answer"}
    assert {*SITES} == {site.value for site in Site}
    assert (bits_term("w4a4"), bits_term("mine")) == ("W4A4", "mine")


def test_bins_are_drawn_as_they_are_and_channels_are_no_line(activations: Figure) -> None:
    report = reports(PUBLISHED / "experiments_tiny")[0]
    row = next(row for row in report["rows"] if row["site"] == "qkv_input")
    histogram, channels = activations.axes[:2]
    for state, steps in zip(("masked", "unmasked"), histogram.findobj(StepPatch), strict=True):
        values, edges, _ = steps.get_data()
        assert np.nan_to_num(values).tolist() == row[state]["density"]
        assert (edges[0], edges[-1]) == (-report["half_range"], report["half_range"])
    lines = channels.get_lines()
    assert [line.get_linestyle() for line in lines] == ["None", "None"]
    assert lines[0].get_ydata().tolist() == row["masked"]["channel_absmax"]


def test_figures_are_vector_and_png_and_none_is_left_open(activations: Figure, tmp_path: Path) -> None:
    assert isinstance(activations, ShownFigure)
    assert activations._repr_png_().startswith(b"\x89PNG")
    png, pdf = figures.save(activations, tmp_path / "one")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"/Type3" not in pdf.read_bytes()
    assert pyplot.get_fignums() == []
