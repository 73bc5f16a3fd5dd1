"""An experiment that is a benchmark: one command, one clear error, and what its script is run with."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from starquant.runs import judgement
from starquant.sweeps import benchmark
from starquant.sweeps.command_line import main
from starquant.sweeps.status import main as status
from tests.support.paths import REPOSITORY


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))  # for as long: a file there has a package's name


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("runtime.device=cpu",), "runtime.device: got 'cpu', allowed: a GPU for experiment=table4_efficiency (cuda"),
        (("method=rtn",), "method: experiment=table4_efficiency does not read it; allowed: experiment, runtime.device"),
        (("-m", "seed=1,2"), "seed: experiment=table4_efficiency does not read it"),
        (("dry_run=true",), "dry_run: experiment=table4_efficiency does not read it"),
    ],
)
def test_what_it_cannot_do_is_refused(words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=table4_efficiency", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {line}") and said.err.count("\n") == 1 and not said.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=table4_efficiency", f"paths.results={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: runtime.device: 'cuda' cannot be used here") and said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_its_script_measures_into_the_results_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str]) -> SimpleNamespace:
        ran.append(command)
        row = {"model": "llada", "shape": "8b", "precision": "bf16", "ends": 8, "launch": "graph", "kind": "forward"}
        row |= {"batch": 1, "tokens": 16, "ms": 4.0, "tokens_per_s": 4000.0, "resident_bytes": 16e9, "joules": 1.25}
        path = Path(command[-1])
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"device": "H100", "rows": [row]}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(judgement, "validate_device_here", lambda device: None)
    assert main(["experiment=table4_efficiency", "runtime.device=cuda:1", f"paths.results={tmp_path}"]) == 0
    file = tmp_path / "efficiency" / "table4_efficiency.json"
    script = str(REPOSITORY / "benchmarks" / "efficiency.py")
    assert ran == [[sys.executable, script, "--device", "cuda:1", "--out", str(file)]]
    assert "| bf16 | graph | 4.00 | 4000 | 1.00x | 16.00 |" in (printed := capsys.readouterr().out)
    assert "| 1.25 |" in printed and "The paper's figures" in printed


def test_its_rows_are_those_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    import efficiency

    assert efficiency.LENGTHS == (16, 128, 512, 1024, 2048, 4096) and efficiency.BATCHES == (1,)
    assert {"bf16", "w4a4-plain", "w4a4-quarot", "w4a4", "w4a4-plus", "w8a8", "w4a16"} == {*efficiency.PRECISIONS}
    arguments = SimpleNamespace(lengths=efficiency.LENGTHS, batches=efficiency.BATCHES, generation=True)
    arguments.shape, arguments.ends = "8b", 8
    rows = efficiency.rows_of("dream", "w4a4", "graph", arguments)
    assert [row["tokens"] for row in rows] == [*efficiency.LENGTHS, 128] and rows[-1]["kind"] == "generation"


def test_rows_are_kept_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kept_rows

    row = dict.fromkeys(kept_rows.Results.KEYS, "x")
    path = tmp_path / "rows.json"
    monkeypatch.setattr(kept_rows.tiles, "MEASURED", dict(kept_rows.tiles.MEASURED))
    kept_rows.Results(path, "H100", {}).add(row | {"ms": 1.0})
    again = kept_rows.Results(path, "H100", {})
    assert again.holds(row) and not again.holds(row | {"tokens": "y"})
    with pytest.raises(SystemExit, match="was measured on H100, this is A100"):
        kept_rows.Results(path, "A100", {})
    known = dict(kept_rows.tiles.MEASURED)
    tile = kept_rows.tiles.Tile(64, 64, 128, 1, 4, 3)
    kept_rows.tiles.add({"H100": kept_rows.tiles.Measured({"int8 16 x 8 x 8": tile}, {})})
    with pytest.raises(SystemExit, match="was measured with other launch settings"):
        kept_rows.Results(path, "H100", {})
    monkeypatch.setattr(kept_rows.tiles, "MEASURED", known)
    monkeypatch.setattr(kept_rows, "code_digest", lambda: "0123456789ab")
    with pytest.raises(SystemExit, match="was measured with other code"):
        kept_rows.Results(path, "H100", {})


def test_rows_are_of_all_that_the_benchmark_imports() -> None:
    import kept_rows

    benchmarks = Path(kept_rows.__file__).parent
    assert {benchmarks.parent / "starquant" / "kernels" / "tiles.json"} < {*kept_rows.code_files()}
    names: set[str] = set()
    for file in kept_rows.MEASURING:
        for node in ast.parse((benchmarks / file).read_text(encoding="utf-8")).body:
            names |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    rooms = {name.split(".")[1] for name in names if name.startswith("starquant.")}
    assert rooms <= {*kept_rows.ROOMS}
    own = {f"{name}.py" for name in names if (benchmarks / f"{name}.py").exists()}
    assert own <= {*kept_rows.MEASURING, "kept_rows.py", "prediction.py"}  # which decide no number of a row


def test_energy_is_of_one_call() -> None:
    from measure import energy_meter, joules

    calls: list[int] = []
    assert joules(lambda: calls.append(1), lambda: 2.5 * len(calls), seconds=0.01) == 2.5
    assert joules(lambda: calls.append(1), None) is None and energy_meter("cpu") is None


def test_it_has_no_cells(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["table4_efficiency"]) == 2
    assert "table4_efficiency', a benchmark without cells" in capsys.readouterr().err


def test_the_script_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = str(REPOSITORY / "benchmarks" / "efficiency.py")
    monkeypatch.setattr(sys, "argv", [script, "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == "error: --device cuda: there is no GPU here" and capsys.readouterr().err == ""
