"""Weights & Biases without a network: what its files hold, who is told twice, and what a failure leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from starquant.config.execution import TrackerSpec
from starquant.session.tracker import NullTracker
from starquant.store.record import RunRecord
from starquant.store.records import read_record
from starquant.tracking import make_tracker
from starquant.tracking.description import flatten, run_name
from starquant.tracking.tracker import WandbTracker, marker_of
from tests.support.paths import REPOSITORY
from tests.support.records import edit_record, fidelity_rows, items_of, write_record
from tests.support.specs import spec
from tests.support.wandb_files import OfflineRun, offline_runs

PROJECT, GROUPS = "quant", ("testbed", "table5_w8a8", "testbed")
TRACKER = TrackerSpec(name="wandb", project=PROJECT, timeout_s=120.0)
KL = [[1.0, 2.0, 4.0], [3.0, 6.0, 8.0], [5.0, 4.0]]  # by prompt and step; the last prompt ends earlier


def measured(kl: list[list[float]]) -> list[dict[str, Any]]:
    """Fidelity's rows; the other metric is an eighth."""
    return [row | ({"hidden_mse": row["kl"] / 8} if "kl" in row else {}) for row in fidelity_rows(kl)]


def tell(folder: Path, *records: Path, tracker: TrackerSpec = TRACKER) -> WandbTracker:
    teller = WandbTracker(tracker, folder)
    for record in records:
        teller.publish(record)
    return teller


def finished_later(path: Path, results: Path) -> Path:
    """The same record, computed again."""
    again = results / path.name
    shutil.copyfile(path, again)
    edit_record(again, lambda data: data["provenance"].update(finished_at="2999-01-01T00:00:00+00:00"))
    return again


@dataclass
class Told:
    """Records and what W&B has written of them: with fidelity, of an experiment, with fidelity of one prompt."""

    folder: Path
    paths: tuple[Path, ...]

    @property
    def records(self) -> list[RunRecord]:
        return [read_record(path) for path in self.paths]

    def runs(self) -> list[OfflineRun]:
        runs = offline_runs(self.folder)
        return [runs[record.digest][0] for record in self.records]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    results = tmp_path_factory.mktemp("results")
    items = {"testbed_facts": items_of([1.0, 0.0])}
    paths = (
        write_record(results, items | {"fidelity": measured(KL)}, "bits=w4a4"),
        write_record(results, items, "bits=w8a8", "experiment=table5_w8a8"),
        write_record(results, items | {"fidelity": measured(KL[:1])}, "bits=w3a3"),
    )
    folder = results / "wandb"
    tell(folder, *paths).close()
    return Told(folder, paths)


def test_a_run_is_named_by_its_record_and_grouped_by_experiment_or_tasks(told: Told) -> None:
    for run, record, group in zip(told.runs(), told.records, GROUPS, strict=True):
        assert run.run.run_id == record.digest
        assert (run.run.project, run.run.run_group, run.run.job_type) == (PROJECT, group, "rtn")
        assert run.run.display_name == f"tiny:0-{record.spec['bits']['name']}-rtn-seed0"
        assert run.ended


def test_every_setting_that_was_used_is_a_dotted_name_and_no_other(told: Told) -> None:
    run, record = told.runs()[0], told.records[0]
    config = {key: value for key, value in run.config.items() if key != "_wandb"}
    assert config.pop("digest") == record.digest
    assert config.pop("git_sha") == record.provenance["git_sha"]
    assert config["bits.weights.bits"] == 4
    assert config["model.protocol.testbed_facts.mc_num"] == 16
    nested: dict[str, Any] = {}
    for key, value in config.items():
        assert not isinstance(value, dict)
        *parents, leaf = key.split(".")
        here = nested
        for parent in parents:
            here = here.setdefault(parent, {})
        here[leaf] = value
    scored = record.spec["tasks"]["names"]
    assert nested["model"].pop("protocol").keys() == {*scored}
    assert nested.pop("evaluation_version")
    assert nested.pop("calibration") == {"name": "none"}  # RTN reads none
    for room, values in nested.items():
        for key, value in flatten(values).items():  # each is the record's
            expected: Any = record.spec[room]
            for part in key.split("."):
                expected = expected[part] if part else expected
            assert value == expected
    assert not {"tracker", "paths", "debug", "export"} & nested.keys()


def test_names_tell_seeds_apart() -> None:
    seeds = (("model.seed=0", "seed=0"), ("model.seed=1", "seed=0"), ("model.seed=0", "seed=1"))
    rotations = [("method=quarot", f"method.rotation_seed={seed}") for seed in (0, 1)]
    starts = [("method=flatquant", f"method.start_seed={seed}") for seed in (0, 1)]
    names = [run_name(spec(*words).model_dump(mode="json")) for words in (*seeds, *rotations, *starts)]
    assert len({*names}) == len(names)
    assert names[1] == "tiny:1-w4a4-rtn-seed0"
    assert names[3] == "tiny:0-w4a4-quarot-rotation0-seed0"


def test_scores_and_seconds_are_the_summary(told: Told) -> None:
    summary = told.runs()[0].summary
    assert summary["score/testbed_facts/acc,none"] == 0.5
    assert summary["seconds/evaluate"] == 1.0


def test_fidelity_is_charted_along_the_denoising_steps(told: Told) -> None:
    run, other, alone = told.runs()
    assert run.metrics == {"fidelity/*": "denoising_step"}
    expected = ({1: 3.0, 2: 4.0, 3: 6.0}, {}, {1: 1.0, 2: 2.0, 3: 4.0})  # means over the prompts that have the step
    for one, means in zip((run, other, alone), expected, strict=True):
        rows = [row for row in one.history if "denoising_step" in row]
        assert len(rows) == len(means)
        assert {row["denoising_step"]: row["fidelity/kl"] for row in rows} == pytest.approx(means)
        assert {row["denoising_step"]: row["fidelity/hidden_mse"] * 8 for row in rows} == pytest.approx(means)


def test_scores_are_a_table_and_the_trajectory_a_figure(told: Told) -> None:
    for one in told.runs():
        (path,) = [row["scores/path"] for row in one.history if "scores/path" in row]
        table = json.loads((one.folder / "files" / path).read_text())
        assert path in one.files
        assert table["columns"] == ["task", "metric", "filter", "value", "stderr", "n"]
        assert table["data"] == [["testbed_facts", "acc", "none", 0.5, None, 2]]
    run, other, alone = told.runs()
    (image,) = [row["figures/trajectory/path"] for row in run.history if "figures/trajectory/path" in row]
    assert image in run.files
    assert (run.folder / "files" / image).read_bytes().startswith(b"\x89PNG")
    assert not any("figures" in file for file in other.files)  # not measured
    assert not any("figures" in file for file in alone.files)  # one prompt has no interval
    assert "no figure: " in (told.folder / "wandb_worker.log").read_text()


def test_the_record_is_an_artifact_kept_with_the_run(told: Told) -> None:
    for run, record, path in zip(told.runs(), told.records, told.paths, strict=True):
        artifact = run.artifacts[f"record-{record.digest}"]
        assert artifact.type == "record"
        (content,) = artifact.manifest.contents
        assert content.path == path.name
        assert Path(content.local_path).is_relative_to(told.folder)  # `wandb sync` needs it, on any machine
        assert Path(content.local_path).read_bytes() == path.read_bytes()


def test_a_record_is_told_once_and_again_when_it_is_newer(told: Told, tmp_path: Path) -> None:
    path, record = told.paths[0], told.records[0]
    marker = marker_of(told.folder, record.digest, PROJECT, "offline")
    assert marker.parent == told.folder / "published"
    assert marker.read_text() == record.provenance["finished_at"]
    before = len(offline_runs(told.folder)[record.digest])
    tell(told.folder, path).close()
    assert len(offline_runs(told.folder)[record.digest]) == before
    tell(told.folder, finished_later(path, tmp_path)).close()
    runs = offline_runs(told.folder)
    assert len(runs) == 3  # the run id is the same
    assert len(runs[record.digest]) == before + 1
    assert marker.read_text().startswith("2999")


def test_another_project_is_told_too(told: Told, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = TRACKER.model_copy(update={"project": "other", "timeout_s": 0.05})
    tell(told.folder, told.paths[0], tracker=other).close()
    assert "W&B did not answer within 0.05 s" in capsys.readouterr().err  # it was asked
    assert not marker_of(told.folder, told.records[0].digest, "other", "offline").exists()


def test_a_failed_worker_is_named_and_leaves_no_marker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_record(tmp_path, {}, "bits=w4a4")
    path.write_text(path.read_text().replace('"schema_version": 4', '"schema_version": 99'))
    folder = tmp_path / "wandb"
    tell(folder, path).close()
    message = capsys.readouterr().err
    assert message.startswith("warning: W&B failed with code 1 ")
    assert str(path) in message
    assert str(folder / "wandb_worker.log") in message
    assert "schema_version is 99" in (folder / "wandb_worker.log").read_text()
    assert not (folder / "published").exists()


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_record(tmp_path, {}, "bits=w4a4")
    (tmp_path / "file").write_text("mine")
    tell(tmp_path / "file" / "wandb", path).close()
    message = capsys.readouterr().err
    assert message.startswith("warning: W&B was not told ")
    assert str(path) in message


def test_where_wandb_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr("starquant.tracking.tracker.WandbTracker", lambda _, folder: asked.append(folder))
    make_tracker(spec("tracker=wandb", f"paths.results={tmp_path}"))
    make_tracker(spec("tracker=wandb", f"paths.results={tmp_path}", f"tracker.dir={tmp_path}/elsewhere"))
    assert asked == [tmp_path / "wandb", tmp_path / "elsewhere"]


def test_without_a_tracker_nothing_is_imported_or_written(tmp_path: Path) -> None:
    path = write_record(tmp_path, {}, "bits=w4a4")
    assert isinstance(make_tracker(spec(f"paths.results={tmp_path}")), NullTracker)
    code = (
        "import json, sys; from pathlib import Path; from starquant.config.run import RunSpec; "
        "from starquant.tracking import make_tracker; "
        "tracker = make_tracker(RunSpec.from_config(json.loads(Path(sys.argv[1]).read_text())['spec'])); "
        "tracker.publish(Path(sys.argv[1])); tracker.close(); sys.exit('wandb' in sys.modules)"
    )
    before = sorted(tmp_path.rglob("*"))
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=REPOSITORY).returncode == 0
    assert sorted(tmp_path.rglob("*")) == before
