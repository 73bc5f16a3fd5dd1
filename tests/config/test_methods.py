"""Presets and variants of methods: one YAML each, validated without torch, known by their own name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.errors import ConfigError
from tests.support.specs import CONF, OPTIONS, compose, spec

VARIANTS = {
    "quarot_rtn": "quarot",
    "quarot_folded": "quarot",
    "plus_folded": "quarot",
    "star_quant_no_tac": "star_quant",
    "star_quant_no_sgat": "star_quant",
    "star_quant_closed_form": "star_quant",
    "star_quant_plus": "star_quant",
}


def test_every_preset_is_a_method_or_a_variant_of_one() -> None:
    algorithms = {name: spec(f"method={name}").method.algorithm for name in OPTIONS["method"]}
    assert {name: algorithm for name, algorithm in algorithms.items() if name != algorithm} == VARIANTS
    assert set(algorithms) - set(VARIANTS) == set(METHODS)


@pytest.mark.parametrize("name", OPTIONS["method"])
def test_a_preset_is_called_like_its_file(name: str) -> None:
    assert spec(f"method={name}").method.name == name


def variant_of(parent: str, text: str, folder: Path) -> RunSpec:
    """A run of a preset that lies in a folder beside conf/."""
    (folder / "method").mkdir(exist_ok=True)
    preset = folder / "method" / "mine.yaml"
    preset.write_text(f"defaults:\n  - {parent}\n  - _self_\n\n{text}\n")
    words = [f"hydra.searchpath=[file://{folder}]", "method=mine"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("config", overrides=words), resolve=True)
    assert isinstance(config, dict)
    return RunSpec.from_config(config)


def test_a_variant_is_one_yaml(tmp_path: Path) -> None:
    run = variant_of("awq", "name: awq_coarse\ngrid: 4", tmp_path)
    parent = spec("method=awq")
    assert run.model_dump(mode="json")["method"] == parent.model_dump(mode="json")["method"] | {
        "name": "awq_coarse",
        "grid": 4,
    }
    assert run.method.algorithm == "awq"
    assert type(run.method) is type(parent.method)
    assert run.canonical().digest() != parent.canonical().digest()


def test_a_variant_of_full_precision_is_full_precision(tmp_path: Path) -> None:
    run = variant_of("none", "name: reference_row", tmp_path)
    assert run.is_baseline
    assert run.canonical() == spec("method=none").canonical()


def test_a_variant_that_only_rounds_is_full_precision_at_16_bits(tmp_path: Path) -> None:
    run = variant_of("rtn", "name: rtn_clipped\nweights: {mse_clip: true}", tmp_path)
    assert not run.is_baseline
    at_16 = run.model_copy(update={"bits": spec("bits=w16a16").bits})
    assert at_16.canonical().is_baseline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: none", "^method.name: got 'none' for algorithm 'awq', but another algorithm has that name"),
        ("name: AWQ-coarse", "^method.name: got 'AWQ-coarse', allowed: up to 48 lower-case letters, digits and _$"),
        ("algorithm: awk", "^method.algorithm: got 'awk', allowed: awq, .* Did you mean 'awq'"),
        ("algorithm: null", "^method.algorithm: missing; allowed: awq, "),
        (
            "gird: 4",
            "^method.gird: unknown key; allowed: name, algorithm, authors, weights, scale, .* Did you mean 'grid'",
        ),
        ("grid: 0", "^method.grid: got 0, allowed: greater than or equal to 1$"),
    ],
)
def test_what_a_variant_may_not_say(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        variant_of("awq", text, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "sgat.masked.qkv_input=0.1 transform.structure=shared",
            "sgat.masked: got 0.1 at qkv_input and 0.03125 at gate_up_input, which share a transform "
            "(method.transform.structure=shared); allowed: one share for both",
        ),
        (
            "transform.balance=true transform.fit=fixed",
            "transform.balance: got true, but method.transform.fit is 'fixed', start 'rotation', structure 'auto'; "
            "allowed: true with learned, rotation and another structure than shared",
        ),
        (
            "transform.channel_scales=true",
            "transform.channel_scales: got true, but method.residual_rotation is 'hadamard' and method.transform.fit "
            "'learned'; allowed: true with none and learned or closed_form",
        ),
        ("transform.sites=residual", "transform.sites: got residual, but structure is 'auto'; allowed: shared"),
        (
            "fisher.rows=true transform.fit=closed_form",
            "fisher.rows: got true, but no site learns a transform of its own (method.transform.fit=closed_form, "
            "structure=auto); allowed: false",
        ),
        (
            "fisher.hessian=true",
            "fisher.hessian: got true, but method.weights.name=rtn reads no second moments; allowed: false",
        ),
        (
            "transform.structure=shared residual_rotation=none",
            "residual_rotation: got 'none', but method.transform.structure=shared learns the residual rotation; "
            "allowed: hadamard, orthogonal",
        ),
    ],
)
def test_options_of_a_transform_that_do_not_go_together_are_refused(settings: str, message: str) -> None:
    """As the configuration is read, before a model is."""
    with pytest.raises(ConfigError) as error:
        spec("method=star_quant", *(f"method.{setting}" for setting in settings.split()))
    assert str(error.value) == f"method.{message}"


def test_all_presets_are_validated_without_torch() -> None:
    code = (
        "import json, sys; from starquant.config.run import RunSpec\n"
        "for config in json.load(sys.stdin): RunSpec.from_config(config).canonical().digest()\n"
        "bad = {'torch', 'transformers', 'hydra', 'numpy', 'starquant.methods'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    configs = json.dumps([compose(f"method={name}") for name in OPTIONS["method"]])
    done = subprocess.run([sys.executable, "-c", code], input=configs, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
