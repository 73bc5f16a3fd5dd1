"""The example of docs/adding-a-method.md is a method: its own code blocks are run."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import yaml

from starquant.config.run import METHODS
from starquant.reports import definitions
from tests.support.models import fresh, logits, trajectory
from tests.support.paths import REPOSITORY
from tests.support.specs import spec
from tests.support.states import states_of

DOCUMENT = (REPOSITORY / "docs" / "adding-a-method.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def test_the_example_runs(tmp_path: Path, monkeypatch) -> None:
    source, line, row = blocks("python")
    preset, sweep = blocks("yaml")
    name, target = re.findall(r'"([^"]+)": "([^"]+)"', line)[0]
    module_name, attribute = target.split(":")
    path = tmp_path / "example.py"
    path.write_text(source)
    found = spec_from_file_location(module_name, path)
    module = module_from_spec(found)
    monkeypatch.setitem(sys.modules, module_name, module)
    found.loader.exec_module(module)
    monkeypatch.setitem(METHODS._targets, name, target)

    parent = yaml.safe_load((REPOSITORY / "conf" / "method" / "rtn.yaml").read_text())
    written = parent | {key: value for key, value in yaml.safe_load(preset).items() if key != "defaults"}
    method_class = METHODS.load(name)
    assert method_class is getattr(module, attribute)
    options = method_class.Options.model_validate_json(json.dumps(written))
    assert options == method_class.Options(name=name)

    (made,) = eval(row.partition("#")[0].strip(), vars(definitions))  # the helper of the table
    assert made.where["method.name"] == name and name in sweep
    method, model = method_class(options), fresh("dream_gqa")
    fitted = method.fit(model, spec("bits=w4a4").bits, states_of(model))
    method.apply(model, fitted, spec("bits=w16a16").bits)
    reference = fresh("dream_gqa")
    ids = trajectory(reference)
    exact, got = logits(reference, ids), logits(model, ids)
    assert float((exact - got).norm() / exact.norm()) <= 1e-4
    scale = fitted.get("block_000")["qkv_input.scale"]
    assert scale.std() > 0.01
