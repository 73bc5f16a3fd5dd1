"""Figures are drawn from records and reports, and bad input is one clear error."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from starquant.calibration.batches import CalibrationStates, StateBatch
from starquant.errors import RecordError
from starquant.evaluation.activations import measure
from starquant.models.base import MaskedDiffusionModel
from starquant.reports.activations import render
from starquant.reports.figures import main, read_report, save, trajectory
from starquant.runs.execute import execute
from starquant.runs.inspect import _is_of
from tests.support.records import fidelity_rows, write
from tests.support.specs import spec


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    run = spec("method=star_quant", "stage=inspect", "calibration.source.segments=8", f"paths.results={results}")
    found = execute(run)
    assert (found.record, found.reused) == (None, False)
    assert execute(run).reused
    return found.path


def test_lines_are_means_over_prompts(tmp_path: Path) -> None:
    path = write(tmp_path, "w4a4", {"fidelity": fidelity_rows([[1.0, 3.0], [3.0, 5.0]])})
    (line,) = trajectory([("A", path)], "kl").axes[0].lines
    assert line.get_xydata().tolist() == [[1, 2], [2, 4]]
    assert line.get_label() == "A"


def test_both_figures_are_written_as_png_and_pdf(report: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "w4a4", {"fidelity": fidelity_rows([[1.0, 3.0], [3.0, 5.0]])})
    assert main(["trajectory", f"RTN={path}", "--metric", "kl", "--out", str(tmp_path / "three")]) == 0
    assert main(["activations", str(report), "--site", "down_input", "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")


def test_an_edited_report_is_refused_and_set_aside(report: Path) -> None:
    whole = report.read_text()
    content = json.loads(whole)
    content["rows"][0]["masked"]["channel_absmax"][0] = 99.0
    report.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=r"its content is not that of its seal"):
        read_report(report)
    assert not _is_of(report, content["provenance"]["code_digest"]) and not report.exists()
    assert report.with_name(f"{report.name}.damaged").exists()
    report.write_text(whole)
    del content["seal"]
    report.with_name("early.json").write_text(json.dumps(content))
    assert read_report(report) and read_report(report.with_name("early.json"))


def test_bad_input_is_named(report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "w4a4", {"fidelity": fidelity_rows([[1.0, 3.0], [3.0, 5.0]])})
    out = str(tmp_path / "x")
    assert main(["trajectory", str(path), "--metric", "colour", "--out", out]) == 2
    assert main(["activations", str(report), "--site", "door", "--out", out]) == 2
    assert main(["activations", str(path), "--out", out]) == 2
    assert main(["trajectory", str(path), "--out", str(tmp_path / "no" / "x")]) == 2
    said = capsys.readouterr().err
    for part in (
        "have no colour",
        "--site: got 'door', allowed: qkv_input",
        "not a report of",
        "is no folder",
    ):
        assert part in said
    assert not list(tmp_path.glob("x*"))


def test_reports_hold_every_site_and_both_states(report: Path) -> None:
    rows: list[dict[str, Any]] = json.loads(report.read_text())["rows"]
    assert [(row["block"], row["site"]) for row in rows][:4] == [
        (0, site) for site in ("qkv_input", "out_input", "gate_up_input", "down_input")
    ]
    assert len(rows) == 16
    for row in rows:
        for state in ("masked", "unmasked"):
            found = row[state]
            assert len(found["channel_absmax"]) == row["width"]
            assert max(found["channel_absmax"]) == pytest.approx(found["absmax"], rel=1e-3)
            assert sum(found["density"]) * 16 / len(found["density"]) == pytest.approx(1, rel=1e-2)
            own = [step["own"] for step in found["idle_energy"]]
            assert all(a <= b + 1e-9 for a, b in itertools.pairwise(own))
            assert all(step["own"] <= step["other"] + 1e-9 for step in found["idle_energy"])


def test_masked_rows_of_the_first_attention_input_are_one_vector(tiny: MaskedDiffusionModel) -> None:
    """So that 31 of 32 directions are idle for them: why that site is not gated."""
    ids = torch.randint(5, 300, (8, 64))
    masked = torch.arange(64) % 2 == 0
    ids = ids.masked_fill(masked, tiny.mask_token_id)
    batch = StateBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.full((8,), 0.5))
    first = measure(tiny, CalibrationStates([batch], tiny.mask_token_id))[0]
    assert first["site"] == "qkv_input"
    assert first["masked"]["tokens"] == 256
    assert first["masked"]["idle_energy"][-1]["own"] == pytest.approx(0, abs=1e-9)
    assert first["unmasked"]["idle_energy"][-1]["own"] > 1e-6


def test_directions_and_extremes_are_those_of_the_activations(
    golden_model: MaskedDiffusionModel,
) -> None:
    """Computed once more from all rows of one site, which the report sees through second moments and samples."""
    ids_BL = torch.tensor([[5, 6, golden_model.mask_token_id, 8, golden_model.mask_token_id, 10, 11, 12]])
    ids_BL = torch.cat((ids_BL, ids_BL + (ids_BL != golden_model.mask_token_id).long()))
    batch = StateBatch(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool), torch.full((2,), 0.25, dtype=torch.float64))
    states = CalibrationStates([batch], golden_model.mask_token_id)
    block = golden_model.trunk().blocks[1]
    seen: list[torch.Tensor] = []
    module = next(iter(golden_model.block_sites(block).inputs.values()))
    handle = module.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    golden_model(ids_BL)
    handle.remove()
    rows = {
        name: seen[0][(ids_BL == golden_model.mask_token_id) == (name == "masked")].double()
        for name in ("masked", "unmasked")
    }
    found = next(row for row in measure(golden_model, states) if (row["block"], row["site"]) == (1, "qkv_input"))
    for state, rows_ND in rows.items():
        energy_N, energy_D = rows_ND.square().sum(1), rows_ND.square().sum(0)
        values = torch.linalg.eigvalsh(rows_ND.T @ rows_ND)
        crest = (rows_ND.abs().amax(1) / rows_ND.square().mean(1).sqrt()).mean()
        expected = {
            "absmax": rows_ND.abs().max(),
            "crest": crest,
            "channel_share": energy_D.max() / energy_D.sum(),
            "token_ratio": energy_N.max() / energy_N.mean(),
            "top_energy": values[-16:].sum() / values.sum(),
        }
        for name, value in expected.items():
            assert found[state][name] == pytest.approx(float(value), rel=1e-5), name


def test_a_report_is_printed_with_a_line_a_site(report: Path) -> None:
    lines = render(report).splitlines()
    rows = json.loads(report.read_text())["rows"]
    assert len(lines) == 1 + 1 + 2 + len(rows) + 3
    cells = lines[4].split()
    assert cells[:2] == ["0", "qkv_input"]
    assert float(cells[-4]) == pytest.approx(rows[0]["overlap"], abs=0.005)
    idle = [rows[0]["idle_directions"][name] for name in ("masked", "unmasked", "both")]
    assert [float(cell) for cell in cells[-3:]] == pytest.approx(idle, abs=0.5)


def test_a_figure_that_cannot_be_written_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    figure = plt.figure()
    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/a\.png'"):
        save(figure, tmp_path / "a")
    plt.close(figure)
