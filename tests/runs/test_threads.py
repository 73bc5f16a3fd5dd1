"""What is learned does not depend on how many CPU threads a run has; a number asked for is another calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from starquant.errors import StarquantError
from starquant.forecast.forecast import forecast
from starquant.runs.execute import execute
from starquant.session.threads import cpu_threads
from tests.support.specs import spec

FEW = ("stage=calibrate", "calibration.source.segments=6", "fidelity=none")
METHODS = {
    "star_quant": ("method.transform.steps=3",),
    "star_quant_closed_form": ("method.transform.steps=3",),
}


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def calibrated(results: Path, *overrides: str) -> dict[str, bytes]:
    """The files of a calibration."""
    folder = execute(spec(*FEW, f"paths.results={results}", *overrides)).path
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("method", METHODS)
def test_one_and_two_threads_learn_the_same(tmp_path: Path, method: str) -> None:
    words = (f"method={method}", *METHODS[method])
    one, two = (calibrated(tmp_path / str(n), *words, f"runtime.threads={n}") for n in (1, 2))
    assert len(one) > 1
    assert one == two


def test_a_number_asked_for_is_another_calibration() -> None:
    one, two = spec("method=star_quant"), spec("method=star_quant", "calibration.threads=2")
    assert one.calibration_digest() != two.calibration_digest()
    assert "threads" not in one.identity()["calibration"]  # calibrations on one thread keep their digest
    assert two.canonical().baseline().digest() == one.canonical().baseline().digest()
    assert spec("method=quarot_rtn", "calibration.threads=2").canonical().calibration.threads == 2


def test_threads_are_given_back_whatever_happens() -> None:
    torch.set_num_threads(2)
    with pytest.raises(KeyError), cpu_threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("run", "pin"), [(execute, "starquant.runs.execute.pin"), (forecast, "starquant.forecast.forecast.pin")]
)
def test_the_next_run_of_a_process_has_the_threads_of_before(
    run: Callable[..., Any], pin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell of a sweep that asks for no number computes as it would alone."""
    seen = []

    def pinned(_: object) -> None:
        seen.append(torch.get_num_threads())
        raise StarquantError("enough")

    monkeypatch.setattr(pin, pinned)
    torch.set_num_threads(2)
    for overrides in (["runtime.threads=1"], []):
        with pytest.raises(StarquantError, match="enough"):
            run(spec(f"paths.results={tmp_path}", *overrides))
    assert seen == [1, 2]
