"""Runs with calibration and fidelity, from a specification to the record."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from starquant.errors import CheckpointError, ConfigError, DataError
from starquant.evaluation.testbed_tasks import items
from starquant.runs.execute import Result, execute
from starquant.testbed.items import Split
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.specs import spec

FEW = (
    *("calibration.source.segments=12", "fidelity.source.segments=6", "fidelity.resamples=50"),
    *("tasks.names=[testbed_programs]", "tasks.limit=4"),
)


def run(results: Path, *overrides: str) -> Result:
    return execute(spec(*FEW, f"paths.results={results}", *overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("results"), "method=quarot")


def test_record_tells_what_calibration_saw(finished: Result) -> None:
    record = json.loads(finished.path.read_text())
    calibration = record["calibration"]
    assert calibration["source"] == "testbed"
    assert calibration["segments"] == 12
    assert calibration["states"] == 48
    assert sum(calibration["states_per_bin"]) == 48
    assert calibration["fingerprint"] == record["spec"]["calibration"]["fingerprint"]
    assert calibration["overlapping_tasks"] == ["testbed_programs"]
    assert {"notes", "overlap", "empty_bins"} <= set(calibration)
    down = [e for e in record["manifest"] if e["role"] == "down_proj"]
    assert [e["transform"] for e in down] == ["hadamard 256"] * 4
    assert {"reference", "calibrate", "quantize", "evaluate", "fidelity"} <= set(record["timings"]["seconds"])


def test_fidelity_stands_beside_the_accuracy(finished: Result) -> None:
    scores = {(s.task, s.metric, s.filter): s for s in finished.record.scores}
    kl = scores["fidelity", "kl", "all"]
    assert kl.value > 0
    assert kl.ci_low <= kl.value <= kl.ci_high
    assert (kl.unit, kl.n) == ("nats", 4)  # the limit holds prompts too
    assert ("fidelity", "top1_agreement", "mask_ratio_0.25_0.50") in scores
    rows = finished.path.with_suffix(".items") / "fidelity.jsonl"
    assert {json.loads(line)["prompt"] for line in rows.read_text().splitlines()} == set(range(4))
    assert not [s for s in finished.baseline.scores if s.task == "fidelity"]


def test_fidelity_alone_is_a_suite(tmp_path: Path) -> None:
    result = execute(spec("tasks=fidelity", "fidelity.source.segments=4", f"paths.results={tmp_path}"))
    assert {s.task for s in result.record.scores} == {"fidelity"}
    assert result.baseline.scores == []


def test_calibration_text_from_a_file_that_is_scored_is_noticed(tmp_path: Path, capsys) -> None:
    def overlap(text: str) -> dict[str, int]:
        path = tmp_path / "corpus.txt"
        path.write_text(text * 60)
        source = (f"calibration.source.path={path}", "calibration.source.length=16")
        result = run(tmp_path / str(len(text)), "method=gptq", "calibration=text", *source)
        assert result.record.calibration["overlapping_tasks"] == []
        return result.record.calibration["overlap"]

    leaked = items("programs", Split.TEST)[0]
    assert overlap("what is the city of ada ? oslo .\n") == {}
    assert "warning" not in capsys.readouterr().err
    assert overlap(f"{leaked.prompt} {leaked.answer}\n") == {"testbed_programs": 1}
    assert "1 of 4 items of testbed_programs share text with the calibration data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("calibration.source.length=999",),
            "calibration.source.length: got 999, allowed: at most the model's context",
        ),
        (("calibration.source.segments=0",), "calibration.source.segments: got 0, allowed: greater than or equal to 1"),
        (("calibration=none",), "calibration: method 'gptq' needs calibration data"),
        (("calibration.states.sampler=nowhere",), "calibration.states.sampler: got 'nowhere', allowed: clean"),
        (("calibration.states.min_ratio=0.9", "calibration.states.max_ratio=0.1"), "at most max_ratio"),
        (("method.weights.percdamp=-1.0",), "method.weights.percdamp: got -1.0, allowed: greater than 0"),
        (("method.weights.name=rtn",), "method.weights: name: got 'rtn', allowed: gptq"),
        (("model.trajectory.steps=3", "model.trajectory.block_length=4"), "steps 3 must be a multiple of the 2 blocks"),
        (("method=quarot", "bits.weights.group_size=48"), "bits.weights.group_size: got 48, which does not divide"),
        (("calibration.states.sampler=trajectory", "calibration.states.per_segment=9"), "at most the trajectory's 8"),
        (
            ("model.trajectory.gen_length=256", "model.trajectory.block_length=256", "model.trajectory.steps=256"),
            "do not",
        ),
        (("method.weights.percdamp=inf",), "method.weights.percdamp: got inf, allowed: finite number"),
        (("seed=18446744073709551616",), "seed: got 18446744073709551616, allowed: less than 9223372036854775808"),
        (("fidelity.resamples=1",), "fidelity.resamples: got 1, allowed: greater than or equal to 2"),
        (("tasks=fidelity", "method=none"), "fidelity compares a quantized model with full precision"),
        (("fidelity.source.split=dev",), "fidelity.source.split: got 'dev', allowed: train, validation, test"),
    ],
)
def test_bad_settings_are_named(
    tmp_path: Path, overrides: tuple[str, ...], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Before anything is said to run."""
    caplog.set_level(logging.INFO)
    with pytest.raises((ConfigError, DataError)) as caught:
        execute(
            spec(
                *(() if "tasks=fidelity" in overrides else ("tasks.names=[testbed_programs]",)),
                "method=gptq",
                f"paths.results={tmp_path}",
                *overrides,
            )
        )
    assert message in str(caught.value)
    assert "running: " not in caplog.text
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("name", ["lm_head", "gain"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(weights_folder(0), tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    key = {"lm_head": "model.transformer.ff_out.weight", "gain": "model.transformer.ln_f.weight"}[name]
    tensors[key].view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{key} holds values that are not finite"):
        run(tmp_path / "results", f"model.path={folder}", "model.seed=null")
    assert not list((tmp_path / "results").rglob("*.json"))
