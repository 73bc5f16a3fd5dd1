"""What a run refuses before it computes anything: exit code 2, and nothing is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from starquant.errors import ConfigError
from starquant.runs.preflight import validate_paths
from tests.support.command_line import run_in_process
from tests.support.specs import spec

QUICK = ("tasks.names=[testbed_facts]", "tasks.limit=4", "fidelity=none")


def test_16_bits_are_not_exported_whatever_the_method_is_called(tmp_path: Path) -> None:
    line = r"^export\.dir: got method=rtn bits=w16a16 stage=all, but a quantized model"
    with pytest.raises(ConfigError, match=line):
        validate_paths(spec("method=rtn", "bits=w16a16", *QUICK, f"export.dir={tmp_path / 'packed'}"))
    validate_paths(spec("method=quarot", "bits=w16a16", *QUICK, f"export.dir={tmp_path / 'packed'}"))  # transforms


@pytest.mark.parametrize("below", ["", "more"])
def test_a_model_is_not_exported_to_where_results_go(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "folder"
    done = run_in_process("method=rtn", *QUICK, f"export.dir={folder}", results=folder / below)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: export.dir: got {folder}, where the results go (paths.results={folder}")
    assert not folder.exists()
    validate_paths(spec("method=rtn", *QUICK, f"export.dir={folder}/packed", f"paths.results={folder}"))


def states(results: Path) -> list[str]:
    return [json.loads(path.read_text())["state"] for path in (results / "cells").iterdir()]


def test_an_evaluation_without_its_calibration_is_refused(tmp_path: Path) -> None:
    done = run_in_process("method=rtn", "stage=evaluate", *QUICK, results=tmp_path)
    assert (done.returncode, states(tmp_path)) == (2, ["refused"])
    assert "nothing of this code was calibrated for tiny w4a4 rtn" in done.stderr


def test_a_folder_that_holds_the_export_of_another_record_is_refused(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "starquant", "made_by": {"record": "0" * 16}}}
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    results = tmp_path / "results"
    done = run_in_process("method=rtn", *QUICK, f"export.dir={tmp_path / 'packed'}", results=results)
    assert (done.returncode, states(results)) == (2, ["refused"])
    assert done.stderr == f"error: export.dir: {tmp_path}/packed: is there already; allowed: a new or empty folder\n"


def test_a_record_of_a_later_version_is_refused_and_one_that_fails_later_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_in_process("method=none", *QUICK, results=tmp_path).returncode == 0
    (path,) = (tmp_path / "records").glob("*.json")
    text = path.read_text()
    path.write_text(text.replace('"schema_version": 4', '"schema_version": 99'))
    done = run_in_process("method=none", *QUICK, results=tmp_path)
    assert (done.returncode, states(tmp_path)) == (2, ["refused"])
    assert "schema_version is 99, this version reads" in done.stderr and path.exists()

    def full(*_: object, **__: object) -> None:
        raise ConfigError("x: fails once the model is loaded")

    path.write_text(text)
    monkeypatch.setattr("starquant.runs.execute.evaluate_tasks", full)
    done = run_in_process("method=none", *QUICK, "reuse=never", results=tmp_path)
    assert (done.returncode, states(tmp_path)) == (1, ["failed"])
