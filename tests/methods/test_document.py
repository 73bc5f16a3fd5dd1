"""The example of docs/adding-a-method.md is a method, its variant a preset: the page's own code blocks are run."""

from __future__ import annotations

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.methods.base import Method
from starquant.reports import definitions
from tests.support.models import fresh, logits, trajectory
from tests.support.paths import REPOSITORY
from tests.support.specs import CONF, spec
from tests.support.states import states_of

DOCUMENT = (REPOSITORY / "docs" / "adding-a-method.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def module_of(source: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source)
    located = spec_from_file_location(name, path)
    assert located is not None and located.loader is not None
    module = module_from_spec(located)
    monkeypatch.setitem(sys.modules, name, module)
    located.loader.exec_module(module)
    return module


def composed(name: str, folder: Path) -> RunSpec:
    """A run of a method whose YAML lies in a folder beside conf/."""
    words = [f"hydra.searchpath=[file://{folder}]", f"method={name}", "model=tiny"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("config", overrides=words), resolve=True)
    assert isinstance(config, dict)
    return RunSpec.from_config(config)


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's method, registered, its presets in a folder of their own; what it is called."""
    options, code, line, _ = blocks("python")
    registry = sys.modules[type(METHODS).__module__]
    ((name, targets),) = eval(f"{{{line}}}", vars(registry)).items()
    for source, target in zip((options, code), targets, strict=True):
        module_of(source, target.partition(":")[0], tmp_path, monkeypatch)
    monkeypatch.setitem(METHODS._options._targets, name, targets[0])
    monkeypatch.setitem(METHODS._targets, name, targets[1])
    (tmp_path / "method").mkdir()
    for preset in blocks("yaml")[:2]:
        called = re.findall(r"^name: (\w+)$", preset, re.MULTILINE)[0]
        (tmp_path / "method" / f"{called}.yaml").write_text(preset)
    return name


def scales_of(method: Method) -> torch.Tensor:
    """Fit and apply on a model; nothing but rounding may change. Returns the scales of the first site."""
    model, reference = fresh("dream_gqa"), fresh("dream_gqa")
    fitted = method.fit(model, spec("bits=w4a4").bits, states_of(model))
    method.apply(model, fitted, spec("bits=w16a16").bits)
    ids = trajectory(reference)
    exact, got = logits(reference, ids), logits(model, ids)
    assert float((exact - got).norm() / exact.norm()) <= 1e-4
    return fitted.get("block_000")["qkv_input.scale"]


def test_the_example_runs(name: str, tmp_path: Path) -> None:
    run = composed(name, tmp_path)
    assert run.method == METHODS.options(name)(name=name)
    assert scales_of(METHODS.build(run.method)).std() > 0.01


def test_the_variant_is_the_same_method_under_another_name(name: str, tmp_path: Path) -> None:
    run = composed(f"{name}_gptq", tmp_path)
    assert (run.method.name, run.method.algorithm) == (f"{name}_gptq", name)
    assert run.method.weights.name == "gptq"
    assert type(METHODS.build(run.method)) is METHODS.load(name)
    assert scales_of(METHODS.build(run.method)).std() > 0.01


def test_the_row_is_in_the_table(name: str) -> None:
    row, sweep = blocks("python")[-1], blocks("yaml")[-1]
    (made,) = eval(row.partition("#")[0].strip(), vars(definitions))  # the helper of the table
    assert made.where["method.name"] == name and name in sweep
