"""A packed checkpoint is scored by method=packed, and by no other; full precision it is never called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from starquant.config.bits import FULL_PRECISION
from starquant.config.methods import METHODS
from starquant.errors import CheckpointError, ConfigError
from starquant.methods.fitted import Fitted
from starquant.models import load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.packed.export import export
from starquant.quantized.activation_quantizer import ActivationQuantizer
from starquant.quantized.manifest import manifest_of
from starquant.reports.run_table import HEADER, render, rows
from starquant.runs.execute import execute
from starquant.runs.inputs import pin
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.command_line import run_in_process
from tests.support.methods import method_named
from tests.support.records import make_record
from tests.support.specs import spec

TASKS = ("tasks.limit=2", "tasks.names=[testbed_facts]")
BITS = ("bits=w8a8", "bits.weights.clip_ratio=0.95")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model at 8 bits."""
    model, target = load_model(weights_folder(0)), tmp_path_factory.mktemp("packed") / "tiny-w8a8"
    method, bits = method_named("rtn", *BITS)
    method.apply(model, method.fit(model, bits), bits, packed=True)
    export(model, make_record(spec("method=rtn", *BITS)), weights_folder(0), target)
    return target


def at(folder: Path) -> tuple[str, ...]:
    return ("model.seed=null", f"model.path={folder}")


def test_a_packed_checkpoint_is_scored_as_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (*TASKS, *at(folder), f"paths.results={tmp_path}")
    result = execute(spec("method=packed", "fidelity=testbed", "bits=w4a4", *given))
    record = result.record
    assert record is not None and result.baseline is None
    assert [path.name for path in sorted((tmp_path / "records").glob("*.json"))] == [result.path.name]
    assert result.path.name.startswith("tiny-w8a8-packed-")
    assert {score.task for score in record.scores} == {"testbed_facts"} and record.scores[0].value == 1.0
    assert record.spec["bits"] == spec(*BITS).bits.model_dump(mode="json")
    assert {entry.weight_bits for entry in record.manifest if entry.kind == "linear"} == {8}
    cells = [dict(zip(HEADER, row, strict=True)) for row in rows(record, None)]
    assert [(row["full precision"], row["quantized"], row["difference"]) for row in cells] == [("", "100.00", "")]
    assert "packed" in render(record, None, result.path)
    again = execute(spec("method=packed", "bits=w3a3", *given))  # whatever the command line says of bits
    assert again.reused and again.path == result.path


@pytest.mark.parametrize(("how", "integers"), [("auto", "on_gpu"), ("values", "never"), ("integers", "always")])
def test_it_multiplies_as_it_is_told(folder: Path, how: str, integers: str) -> None:
    inputs = pin(spec("method=packed", *TASKS, *at(folder), f"runtime.packed={how}"))
    model = inputs.load("cpu").model
    sites = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    assert {site.integers for site in sites} == {integers} and len(sites) == 4 * 4


def test_integers_that_there_are_none_of_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^runtime.packed: got 'integers' for method 'rtn', allowed: auto"):
        spec("method=rtn", "runtime.packed=integers")
    model, target, bits = load_model(weights_folder(0)), tmp_path / "tiny-w4a16", ("bits=w4a16",)
    method, widths = method_named("rtn", *bits)
    method.apply(model, method.fit(model, widths), widths, packed=True)
    export(model, make_record(spec("method=rtn", *bits)), weights_folder(0), target)
    with pytest.raises(ConfigError, match=r"^runtime.packed: got integers, but w4a16 has none on both sides"):
        pin(spec("method=packed", *TASKS, *at(target), "runtime.packed=integers")).load("cpu")


def test_the_command_line_scores_and_refuses_it(folder: Path, tmp_path: Path) -> None:
    given = ("model=tiny", "bits=w4a4", "tasks=testbed", "fidelity=none", *TASKS, *at(folder))
    done = run_in_process("method=packed", *given, results=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tiny  w8a8 [weights clip=0.95]  packed" in done.stdout
    assert [line.split()[3:] for line in done.stdout.splitlines() if line.startswith("testbed_facts")] == [
        ["100.00", "0.00"]
    ]
    assert "scored as it is, without full precision and fidelity beside it" in done.stderr
    refused = run_in_process("method=none", *given, results=tmp_path)
    assert refused.returncode == 2 and "allowed: method=packed" in refused.stderr


@pytest.mark.parametrize("method", ["none", "rtn", "star_quant"])
def test_every_other_method_is_refused(folder: Path, tmp_path: Path, method: str) -> None:
    message = rf"^model\.path: .*tiny-w8a8 is quantized already, got method={method}; allowed: method=packed, which"
    with pytest.raises(ConfigError, match=message):
        execute(spec(f"method={method}", *TASKS, *at(folder), f"paths.results={tmp_path}"))
    assert not list(tmp_path.rglob("*.json"))


def test_full_precision_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^method: got packed, but .*seed_0 is not packed; allowed: method=none, "):
        execute(spec("method=packed", *TASKS, f"paths.results={tmp_path}"))


def test_bits_that_are_none_are_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["bits"]["head"] = 5
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"copy/config.json: quantization_config.bits: head: got 5, allowed: 2, 3"
    ):
        execute(spec("method=packed", *TASKS, *at(copy), f"paths.results={tmp_path}"))


def test_without_tasks_there_is_nothing_to_score(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tasks.names: got \[\], but of a packed checkpoint fidelity is not measured"
    ):
        spec("method=packed", "tasks=fidelity", *at(folder))


def test_a_packed_checkpoint_is_not_exported_again(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^export.dir: got method=packed stage=all, but a quantized model"):
        execute(spec("method=packed", *TASKS, *at(folder), f"export.dir={tmp_path / 'again'}"))


def applied(name: str, model: MaskedDiffusionModel) -> list[object]:
    return METHODS.build(METHODS.options(name)(name=name)).apply(model, Fitted(), FULL_PRECISION)


def test_no_method_is_applied_to_what_is_quantized(folder: Path) -> None:
    with pytest.raises(ConfigError, match="a method has been applied to this model already"):
        applied("none", load_model(folder))
    quantized = load_model(weights_folder(0))
    method, bits = method_named("rtn", *BITS)
    method.apply(quantized, method.fit(quantized, bits), bits)
    with pytest.raises(ConfigError, match="a method has been applied to this model already"):
        applied("none", quantized)


def test_method_packed_changes_nothing_and_takes_nothing_else(folder: Path) -> None:
    model = load_model(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert applied("packed", model) == manifest_of(model)
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(
        ConfigError, match="method=packed: the model is at full precision; allowed: a packed checkpoint"
    ):
        applied("packed", load_model(weights_folder(0)))
