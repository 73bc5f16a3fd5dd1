"""What a run refuses before it computes anything: exit code 2, and nothing is left."""

from __future__ import annotations

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
