"""The command line as a user meets it: quick answers, one clear message for every bad input, no traceback."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.support.command_line import run, run_in_process
from tests.support.paths import GOLDEN


def refused(tmp_path: Path, *arguments: str) -> str:
    """Run, expect one clear refusal that leaves nothing behind, and return it."""
    results = tmp_path / "results"
    done = run_in_process(*arguments, results=results)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    left = [path for path in results.rglob("*") if path.is_file() and path.suffix != ".log"]
    assert {path.parent.name for path in left} <= {"cells", "locks"}
    told = [json.loads(path.read_text()) for path in results.glob("cells/*.json")]  # what status shows
    assert {one["state"] for one in told} <= {"refused"}
    assert not told or any(one["error"] in errors[0] for one in told)
    return errors[0]


@pytest.mark.parametrize("arguments", [("--help",), ("--cfg", "job"), ("--cfg", "job", "model=llada", "bits=w8a8")])
def test_help_and_configuration_are_quick(arguments: tuple[str, ...]) -> None:
    run(*arguments)  # warm the file cache
    began = time.perf_counter()
    done = run(*arguments)
    assert done.returncode == 0
    assert "Groups" in done.stdout or "bits:" in done.stdout
    assert time.perf_counter() - began < 6.0  # under 2 s on a quiet machine: benchmarks/startup.py


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("bits=w5a5",),
            "bits: got 'w5a5', allowed: q4_0, q8_0, w16a16, w3a3, w4a16, w4a4, w4a4_kv4, w4a4_kv8, "
            "w4a4_softmax_v, w4a8, w8a8. Did",
        ),
        (("method=smothquant",), "method: got 'smothquant', allowed: awq, "),
        (("seed=abc",), "seed: got 'abc', allowed: valid integer"),
        (("foo=1",), "foo: unknown key"),
        (("+foo=1",), "foo: unknown key"),
        (("tasks.limt=3",), "Did you mean 'limit'"),
        (("bits.weights.bits=5",), "bits.weights.bits: got 5, allowed: 2, 3, 4, 8, 16"),
        (("bits=w4a4,w8a8",), "add -m to run a sweep"),
        (("-m", "bits=w4a4,w9a9"), "bits: got 'w9a9'"),
        (("-m", "seed=1,abc"), "seed: got 'abc'"),
        (("bits",), "bits: expected key=value"),
        (("bits=[w4a4",), "error: "),
        (("model.seed=null",), "give either path"),
        (("model=llada", "tasks=testbed"), "no protocol for testbed_facts"),
        (("model.protocol.testbed_programs.sampler.block_length=3",), "must divide gen_length 8"),
        (("+model.protocol.testbed_programs.cfg_scale=1.0",), "a sampler has its own, sampler.cfg_scale"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_bad_configuration(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(tmp_path, *arguments)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llada_mha", tmp_path / "checkpoint"))


def test_options_of_swept_methods_reach_every_cell(tmp_path: Path) -> None:
    """Hydra composes a sweep with the default method first, which need not have the option."""
    cells = ("-m", "method=quarot,quarot_rtn", "method.qk_hadamard=true", "bits=w4a4")
    few = ("calibration.source.segments=8", "tasks.names=[testbed_facts]", "tasks.limit=8", "fidelity=none")
    done = run_in_process(*cells, *few, results=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "records").glob("tiny-w4a4-*.json")]
    assert {record["spec"]["method"]["name"] for record in records} == {"quarot", "quarot_rtn"}
    assert all(record["spec"]["method"]["qk_hadamard"] is True for record in records)


def test_missing_checkpoint_folder(tmp_path: Path) -> None:
    message = refused(tmp_path, "model=llada", f"model.path={tmp_path}/nowhere", "tasks.allow_code_execution=true")
    assert f"{tmp_path}/nowhere: no such checkpoint folder" in message


def test_pickled_weights(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refused(tmp_path, "model=llada", f"model.path={checkpoint}", "tasks.names=[piqa]")
    assert "pytorch_model.bin" in message
    assert "only safetensors are read" in message


def test_another_architecture(tmp_path: Path, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    message = refused(tmp_path, "model=llada", f"model.path={checkpoint}", "tasks.names=[piqa]")
    assert "config.json: model_type is 'llama'; allowed: Dream, llada" in message


def test_truncated_weights(tmp_path: Path, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    message = refused(tmp_path, "model=llada", f"model.path={checkpoint}", "tasks.names=[piqa]")
    assert "model.safetensors: truncated" in message


def test_task_file_with_a_missing_field(tmp_path: Path) -> None:
    file = tmp_path / "data" / "piqa" / "validation.jsonl"
    file.parent.mkdir(parents=True)
    good = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
    file.write_text(json.dumps(good) + "\n" + json.dumps({"goal": "g", "sol1": "a", "label": 1}) + "\n")
    message = refused(tmp_path, "tasks=paper", "tasks.names=[piqa]", f"tasks.data_dir={tmp_path}/data")
    assert f"{file}, line 2: missing field 'sol2'" in message


def test_no_network_for_a_hub_id(tmp_path: Path) -> None:
    message = refused(tmp_path, "model=llada", "tasks.names=[piqa]", "model.path=nobody/nothing")
    assert "nobody/nothing: no local folder of that name, and the hub could not be used" in message


def test_no_consent_for_model_written_code(tmp_path: Path) -> None:
    for choice in (("tasks=humaneval",), ("tasks=paper", "tasks.names=[humaneval]"), ("tasks.names=[piqa,humaneval]",)):
        message = refused(tmp_path, *choice)
        assert "tasks.allow_code_execution: humaneval runs programs that the model writes" in message
    assert not (tmp_path / "results").exists()


def test_tasks_without_consent_are_left_out_of_a_sweep_that_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    suite = "name: mine\nnames: [humaneval, testbed_facts]\nlimit: 8\ndata_dir: null\nallow_code_execution: false\n"
    (tmp_path / "tasks" / "mine.yaml").write_text(suite)
    cells = ("-m", f"--config-dir={tmp_path}", "tasks=mine", "bits=w8a8,w4a4", "method=rtn", "fidelity=none")
    done = run_in_process(*cells, results=tmp_path / "results")
    assert done.returncode == 0, done.stderr
    line = "note: humaneval is left out: it runs programs that the model writes; tasks.allow_code_execution=true agrees"
    assert [text for text in done.stderr.splitlines() if "humaneval" in text] == [f"{line} to that"]
    rows = [text.split() for text in done.stdout.splitlines() if text.startswith(("testbed_facts", "humaneval"))]
    assert [row[0] for row in rows] == ["testbed_facts", "humaneval"] * 2
    assert [row[1:] for row in rows[1::2]] == [["left", "out"]] * 2
    records = [json.loads(path.read_text()) for path in (tmp_path / "results" / "records").glob("*.json")]
    assert len(records) == 3
    for record in records:
        assert record["spec"]["tasks"]["names"] == ["testbed_facts"]
        assert "tasks.allow_code_execution=true" in record["spec"]["tasks"]["left_out"]["humaneval"]
        assert {score["task"] for score in record["scores"]} == {"testbed_facts"}
    logs = [path.read_text() for path in (tmp_path / "results" / "records").glob("tiny-w[48]a[48]-*.log")]
    assert [text.count("humaneval is left out: it runs programs") for text in logs] == [1, 1]


def test_no_tokenizer(tmp_path: Path, checkpoint: Path) -> None:
    message = refused(
        tmp_path, "model=llada", f"model.path={checkpoint}", "method=rtn", "tasks=fidelity", "fidelity=testbed"
    )
    assert "no tokenizer" in message


def test_unavailable_device_and_unshipped_seed(tmp_path: Path) -> None:
    assert "runtime.device: 'tpu9'" in refused(tmp_path, "runtime.device=tpu9")
    assert "model.seed: got 99, allowed: 0, 1, 2 (the embedded models that are shipped)" in refused(
        tmp_path, "model.seed=99"
    )


def test_results_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    done = run_in_process(results=file)
    assert done.returncode == 2  # before anything is run
    assert f"error: paths.results: {file}: cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert file.read_text() == "mine"


def test_one_bad_cell_does_not_stop_a_sweep(tmp_path: Path) -> None:
    """What another run has to leave first is judged by the cell that reads it."""
    cells = ("-m", "stage=evaluate", "method=rtn,none")
    done = run_in_process(*cells, "tasks.names=[testbed_facts]", "tasks.limit=8", results=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "nothing of this code was calibrated for tiny w4a4 rtn; run stage=calibrate first" in done.stderr
    assert "2 cells: 1 done, 1 refused" in done.stderr
    assert len(list((tmp_path / "records").glob("tiny-w16a16-*.json"))) == 1


def test_sweep_computes_full_precision_once(tmp_path: Path) -> None:
    cells = ("-m", "bits=w16a16,w8a8,w4a4", "method=rtn")
    done = run_in_process(*cells, "tasks.names=[testbed_facts]", "tasks.limit=16", results=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("running: tiny-w16a16-none") == 1
    assert done.stderr.count("reused: ") == 2
    names = sorted(p.name.split("-testbed")[0] for p in (tmp_path / "records").glob("*.json"))
    assert names == ["tiny-w16a16-none", "tiny-w4a4-rtn", "tiny-w8a8-rtn"]
    assert done.stdout.count("\ntestbed_facts ") == 3
