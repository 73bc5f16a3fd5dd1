"""Done means done by this command: what was done before does not count, and what was asked for has to be there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from starquant.errors import ConfigError
from starquant.sweeps import command_line, jobs, running
from starquant.sweeps.cell_log import CellEntry, CellLog
from starquant.sweeps.cells import Cell, Plan
from starquant.sweeps.command_line import main, plan_of
from starquant.sweeps.jobs import CellRunner
from starquant.sweeps.sweeper import CellSweeper
from tests.support.command_line import run_in_process
from tests.support.sweeps import Runner, done

ARGUMENTS = ("-m", "method=rtn", "bits=w4a4,w8a8")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Cell], CellEntry | None]], None]:
    """Let something else take the place of a run."""

    def put(one: Callable[[Cell], CellEntry | None]) -> None:
        monkeypatch.setattr(command_line, "CellRunner", lambda: Runner(one))

    return put


def left_done(results: Path, command: str | None, *arguments: str) -> None:
    """Leave the cells of a command line as a command has finished them."""
    plan = plan_of([*arguments, f"paths.results='{results}'"])
    assert plan is not None
    for cell in plan.cells:
        with CellLog(results).running(cell.key, cell.name, command) as outcome:
            outcome.append(done(cell))


def out_of_launcher(error: Exception) -> Callable[[CellSweeper, Plan], None]:
    def launch(self: CellSweeper, plan: Plan) -> None:
        raise error

    return launch


@pytest.mark.parametrize(
    "error", [RuntimeError('Could not detect "srun"'), ValueError("n_jobs == 0 in Parallel has no meaning"), OSError()]
)
def test_a_launcher_that_does_not_start_has_done_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_done(tmp_path, "an earlier one", *ARGUMENTS)
    monkeypatch.setattr(CellSweeper, "launch", out_of_launcher(error))
    assert main([*ARGUMENTS, f"paths.results={tmp_path}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: launcher=basic: {type(error).__name__}: {error}")
    assert lines[1] == "2 cells: 2 missing"
    assert len(lines) == 4  # and a line a cell


def test_of_a_launcher_that_loses_a_worker_only_this_commands_cells_count(
    tmp_path: Path, work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work(done)
    left_done(tmp_path, "an earlier one", *ARGUMENTS)
    left_done(tmp_path, Runner(done).command, "method=rtn", "bits=w8a8")
    monkeypatch.setattr(CellSweeper, "launch", out_of_launcher(RuntimeError("a worker was killed")))
    assert main([*ARGUMENTS, f"paths.results={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert "2 cells: 1 done, 1 missing\n  missing: tiny:0 w4a4 rtn testbed\n" in err


@pytest.mark.parametrize("words", [("-m", "seed=0,1"), ("seed=0",)])
def test_a_cell_that_was_done_and_fails_this_time_is_not_done(
    words: tuple[str, ...], tmp_path: Path, work, capsys: pytest.CaptureFixture[str]
) -> None:
    left_done(tmp_path, "an earlier one", "method=rtn", *words)
    work(lambda cell: None if cell.spec.seed == 0 else done(cell))
    assert main(["method=rtn", *words, f"paths.results={tmp_path}"]) == 1
    work(done)
    assert main(["method=rtn", *words, f"paths.results={tmp_path}"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ("bits.weights.bits=5",),
        ("bits.weights.group_size=7",),
        ("calibration.source.kind=text", "calibration.source.path=gone.txt"),
        ("method=none", "tasks.names=[]"),
        ("model.path=gone", "model.seed=null"),
        ("runtime.device=cuda:99",),
        ("stage=evaluate", "export.dir=run.py"),
    ],
)
def test_what_is_refused_ends_with_2_as_one_run_and_in_a_sweep(
    words: tuple[str, ...], tmp_path: Path, work, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of configuration, shapes, files, checkpoints, devices, targets; in the same words."""
    work(lambda cell: pytest.fail("a cell was run"))
    common = ("method=gptq", f"paths.results={tmp_path}", *words)
    assert main(common) == 2
    alone = capsys.readouterr().err
    assert main(["-m", *common]) == 2
    assert capsys.readouterr().err == alone
    assert alone.startswith("error: ") and "Traceback" not in alone
    assert not list(tmp_path.rglob("*.json"))


def test_a_runner_returns_what_became_of_each_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_done(tmp_path, "an earlier one", "-m", "method=rtn", "seed=0,1,2")

    def execute(cell: Cell, _: object) -> CellEntry:
        errors = {1: ConfigError("bits: a bad one"), 2: ZeroDivisionError()}
        if cell.spec.seed in errors:
            raise errors[cell.spec.seed]
        return done(cell)

    monkeypatch.setattr(jobs, "execute_cell", execute)
    plan = plan_of(["-m", "method=rtn", "seed=0,1,2", f"paths.results={tmp_path}"])
    assert plan is not None
    runner = CellRunner()
    entries = [runner(cell) for cell in plan.cells]
    assert [(entry.state, entry.error) for entry in entries if entry is not None] == [
        ("done", None),
        ("failed", "bits: a bad one"),
        ("failed", "ZeroDivisionError: "),
    ]
    read = [CellLog(tmp_path).read(cell.key, cell.name) for cell in plan.cells]
    assert [entry.state for entry in read] == ["done", "failed", "failed"]
    assert {entry.command for entry in read} == {runner.command}
    assert CellRunner().command != runner.command


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("experiment=table2_ablation",), 1, "error: table2_ablation was not built: "),
        (("experiment=table2_ablation", "stage=calibrate"), 0, ""),  # no table is there to be built
        (("-m", "bits=w4a4", "+experiment.name=mine"), 0, ""),
    ],
)
def test_a_table_that_is_not_built_is_no_success(
    words: tuple[str, ...], code: int, message: str, tmp_path: Path, work, capsys: pytest.CaptureFixture[str]
) -> None:
    work(done)
    assert main([*words, "model=tiny", "method=rtn", f"paths.results={tmp_path}"]) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_a_table_of_an_earlier_time_is_set_aside_where_a_cell_fails(
    tmp_path: Path, work, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tables" / "table2_ablation.md"
    path.parent.mkdir()
    path.write_text("of an earlier time")
    work(lambda cell: None)
    words = ["experiment=table2_ablation", "model=tiny", "method=rtn", f"paths.results={tmp_path}"]
    assert main(words) == 1
    assert "note: table2_ablation.md is of an earlier time: set aside as table2_ablation.md.stale" in (
        capsys.readouterr().err
    )
    assert not path.exists()
    assert path.with_name("table2_ablation.md.stale").read_text() == "of an earlier time"


def test_a_table_that_cannot_be_written_is_one_line(
    tmp_path: Path, work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("starquant.reports.after_sweep.after_sweep", full)
    work(done)
    assert main(["experiment=table2_ablation", "model=tiny", "method=rtn", f"paths.results={tmp_path}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: table2_ablation: cannot be written: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-m", "hydra.sweep.dir=/proc/nowhere"), r"hydra\.sweep\.dir: /proc/nowhere: cannot be written: "),
        (("-m", "hydra.sweep.dir=FILE/x"), r"hydra\.sweep\.dir: .*/x: cannot be written: Not a directory"),
        (("-m", "hydra.job.chdir=true"), r"hydra\.job\.chdir: got true, .*; allowed: false"),
        (("hydra.job.chdir=true",), r"hydra\.job\.chdir: got true, .*; allowed: false"),
        (("-m", "hydra.sweeper.max_batch_size=0"), r"hydra\.sweeper\.max_batch_size: got 0, allowed: null, or"),
        (("-m", "hydra.sweeper.max_batch_size=abc"), r"hydra\.sweeper\.max_batch_size: got 'abc', allowed: null, or"),
    ],
)
def test_what_cannot_be_started_is_refused(
    words: tuple[str, ...], message: str, tmp_path: Path, work, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    left_done(tmp_path / "r", "an earlier one", "-m", "method=rtn")
    work(done)
    given = [word.replace("FILE", str(tmp_path / "file")) for word in words]
    assert main(["method=rtn", *given, f"paths.results={tmp_path / 'r'}"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    with pytest.raises(ConfigError, match=rf"^error: {message}"):
        raise ConfigError(err)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("n_jobs=0", r"hydra\.launcher\.n_jobs: got 0, allowed: 1 to 1024"),
        ("n_jobs=-2", r"hydra\.launcher\.n_jobs: got -2, allowed: 1 to 1024"),
        ("n_jobs=1000000", r"hydra\.launcher\.n_jobs: got 1000000, allowed: 1 to 1024"),
        ("n_jobs=abc", r"Error merging override hydra\.launcher\.n_jobs=abc: .*Value 'abc' of type 'str'"),
    ],
)
def test_a_number_of_processes_is_judged(setting: str, message: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        plan_of(["-m", "method=rtn", "seed=0,1", "launcher=joblib", f"hydra.launcher.{setting}"])
    assert len(str(caught.value).splitlines()) == 1
    assert plan_of(["-m", "method=rtn", "launcher=joblib", "hydra.launcher.n_jobs=-1"]) is not None


def test_hydras_own_launcher_is_one_too(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    with pytest.raises(ConfigError, match=r"^launcher: got 'joblib' for a single run; add -m"):
        plan_of(["method=rtn", "hydra/launcher=joblib"])
    plan = plan_of(["-m", "method=rtn", "hydra/launcher=joblib"])
    assert plan is not None and plan.launcher == "joblib"


def test_slurm_needs_its_own_program_where_it_is_started(
    tmp_path: Path, work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    work(done)
    words = ["-m", "method=rtn", "launcher=slurm", f"paths.results={tmp_path / 'r'}"]
    assert plan_of(words) is not None  # its status can be looked at from anywhere
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error: launcher: got 'slurm', which needs Slurm's srun, and this")
    assert not (tmp_path / "r").exists()


def test_a_bug_of_ours_keeps_its_traceback(
    tmp_path: Path, work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "PACKAGE", Path(__file__).parent)
    monkeypatch.setattr(CellSweeper, "launch", out_of_launcher(RuntimeError("ours")))
    assert main([*ARGUMENTS, f"paths.results={tmp_path}"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_a_launchers_variable_that_is_no_number_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for key, value in (launched | {name: "abc"}).items():
        monkeypatch.setenv(key, value)
    ended = run_in_process("method=rtn", results=tmp_path / "results")
    assert (ended.returncode, ended.stderr) == (
        2,
        f"error: {name}: got 'abc' in the environment, allowed: a whole number\n",
    )
