"""Calibration as an artifact, shared by runs that differ in what they score."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from starquant.errors import ConfigError, RecordError
from starquant.reports.run import Run
from starquant.reports.selection import one_a_seed
from starquant.runs.execute import Result, execute
from starquant.session.devices import leased
from starquant.session.processes import ALONE, LAUNCHED, Processes, launched_rank, processes
from starquant.session.session import Session
from starquant.store.record import RunRecord
from tests.support.specs import spec

METHOD = ("method=star_quant", "method.transform.steps=4", "calibration.source.segments=16")
METHOD += ("fidelity=none", "tasks.limit=8")


def run(results: Path, task: str, *overrides: str) -> Result:
    return execute(spec(*METHOD, f"tasks.names=[{task}]", f"paths.results={results}", *overrides))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    results = tmp_path_factory.mktemp("results")
    return results, run(results, "testbed_facts", "stage=calibrate")


def record_of(result: Result) -> RunRecord:
    assert result.record is not None
    return result.record


def test_calibrating_writes_an_artifact_and_scores_nothing(calibrated: tuple[Path, Result]) -> None:
    results, made = calibrated
    assert (made.record, made.baseline, made.reused) == (None, None, False)
    assert made.path.parent == results / "artifacts"
    header = json.loads((made.path / "artifact.json").read_text())
    assert header["digest"] == made.path.name
    assert set(header["files"]) == {p.name for p in made.path.iterdir()} - {"artifact.json"}
    assert header["identity"]["method"]["name"] == "star_quant"
    assert not list(results.glob("records/*.json"))
    assert not list(results.glob("unfinished/*"))


def test_runs_of_other_tasks_seeds_and_fidelity_share_it(
    calibrated: tuple[Path, Result], capsys: pytest.CaptureFixture[str]
) -> None:
    """Their scores are those of a run that does everything itself."""
    results, made = calibrated
    others = (("testbed_facts",), ("testbed_programs",), ("testbed_facts", "seed=1"))
    others += (("testbed_facts", "fidelity=testbed"),)
    scored = [record_of(run(results, *other, "stage=evaluate")) for other in others]
    assert [path.name for path in (results / "artifacts").iterdir()] == [made.path.name]
    assert capsys.readouterr().err.count(f"calibrated already: {made.path}") == len(others)
    assert len({record.digest for record in scored}) == len(others)
    whole = record_of(run(results.with_name("whole"), "testbed_programs"))
    assert whole.scores == scored[1].scores
    assert whole.fit_report == scored[1].fit_report
    assert whole.calibration == scored[1].calibration
    seconds = json.loads((made.path / "artifact.json").read_text())["seconds"]
    assert scored[0].timings.seconds["calibrate"] == seconds["calibrate"]


def test_what_changes_the_calibration_is_not_shared(calibrated: tuple[Path, Result]) -> None:
    results, _ = calibrated
    for other in ("bits=w8a8", "method.tac.block_size=32", "calibration.seed=1", "model.seed=1"):
        with pytest.raises(RecordError, match=r"nothing of this code was calibrated for .*; run stage=calibrate first"):
            run(results, "testbed_facts", other, "stage=evaluate")


def test_evaluating_without_a_calibration_is_refused_before_full_precision_is_scored(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="run stage=calibrate first"):
        run(tmp_path, "testbed_facts", "stage=evaluate")
    assert not list(tmp_path.glob("records/*.json"))


def test_jobs_of_their_own_for_each_task_make_one_row(calibrated: tuple[Path, Result]) -> None:
    """Split by tasks, the scores are those of the whole; a damaged report beside them harms nothing."""
    results, _ = calibrated
    done = [run(results, task) for task in ("testbed_facts", "testbed_programs")]
    runs = [Run(found.path, record_of(found)) for found in done]
    ((_, joined),) = one_a_seed("row", runs).items()
    assert sorted(joined.get("tasks.names")) == ["testbed_facts", "testbed_programs"]
    assert {score.task for score in joined.record.scores} == {"testbed_facts", "testbed_programs"}
    assert set(joined.items) == {"testbed_facts", "testbed_programs"}


def test_a_calibration_of_other_code_is_made_again_unless_any_will_do(
    calibrated: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, made = calibrated
    monkeypatch.setattr("starquant.store.provenance.CodeDigest.of", lambda *_: "other")
    assert run(results, "testbed_facts", "stage=calibrate", "reuse=any").reused
    with pytest.raises(RecordError, match="nothing of this code was calibrated"):
        run(results, "testbed_facts", "stage=evaluate")
    again = run(results, "testbed_facts", "stage=calibrate")
    assert (again.path, again.reused) == (made.path, False)
    assert json.loads((again.path / "artifact.json").read_text())["code_digest"] == "other"
    monkeypatch.undo()
    assert not run(results, "testbed_facts", "stage=calibrate").reused


def test_full_precision_is_scored_once_even_where_nothing_may_be_reused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("fidelity=none", "tasks.limit=8", "tasks.names=[testbed_facts]", "reuse=never")
    session = Session.open()
    for method in ("rtn", "quarot_rtn"):
        execute(spec(f"method={method}", *common, f"paths.results={tmp_path}"), session)
    assert capsys.readouterr().err.count("running: tiny-w16a16-none") == 1


def seeing(monkeypatch: pytest.MonkeyPatch, *uuids: str | None, mask: str = "all") -> None:
    """Let this process see GPUs of these UUIDs; None: of a torch that knows none."""
    properties = [SimpleNamespace() if uuid is None else SimpleNamespace(uuid=uuid) for uuid in uuids]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(uuids))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)


def test_a_gpu_is_leased_to_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    seeing(monkeypatch, "a", "b")
    with leased("cpu") as plain, leased("cuda:free") as first, leased("cuda:free") as second:
        assert (plain, first, second) == ("cpu", "cuda:0", "cuda:1")
    with leased("cuda:free") as again:
        assert again == "cuda:0"
    seeing(monkeypatch)
    with pytest.raises(ConfigError, match="got 'cuda:free', but torch sees no GPU"), leased("cuda:free"):
        pass


def test_a_gpu_is_the_same_one_under_another_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes may see other GPUs of the machine than each other, numbered as they see them."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("starquant.session.devices.time.sleep", mock.Mock(side_effect=TimeoutError))
    seeing(monkeypatch, "a", "b", mask="0,1")
    with leased("cuda:free") as first:
        seeing(monkeypatch, "b", mask="1")
        with leased("cuda:free") as second:
            assert (first, second) == ("cuda:0", "cuda:0")
        seeing(monkeypatch, "a", mask="0")
        with pytest.raises(TimeoutError), leased("cuda:free"):
            pass
    with leased("cuda:free") as again:
        assert again == "cuda:0"


@pytest.mark.parametrize(("uuid", "masks"), [(None, ("0", "1")), ("a", ("MIG-1", "MIG-2"))])
def test_gpus_that_have_no_name_of_their_own_are_told_apart_by_the_mask(
    uuid: str | None, masks: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an older torch; of the parts of one card."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    seeing(monkeypatch, uuid, mask=masks[0])
    with leased("cuda:free"):
        seeing(monkeypatch, uuid, mask=masks[1])
        with leased("cuda:free") as other:
            assert other == "cuda:0"


def test_a_run_that_waits_for_a_gpu_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    seeing(monkeypatch, "a")
    held = leased("cuda:free")
    held.__enter__()
    monkeypatch.setattr("starquant.session.devices.time.sleep", lambda _: held.__exit__(None, None, None))
    with leased("cuda:free") as device:
        assert device == "cuda:0"
    assert "waiting: all 1 GPUs are leased" in capsys.readouterr().err


def test_one_process_is_the_first_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert processes() is ALONE
    for name in LAUNCHED[:-1]:  # left over from another program
        monkeypatch.setenv(name, "3")
        assert processes() is ALONE
        assert launched_rank() is None
    monkeypatch.setenv(LAUNCHED[-1], "29500")
    assert launched_rank() == 3
    assert ALONE.by_first(lambda: 3) == 3
    assert ALONE.gather_objects("x") == ["x"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    third = Processes(2, 4)
    assert (third.device("cuda"), third.device("cpu"), ALONE.device("cuda")) == ("cuda:2", "cpu", "cuda")
