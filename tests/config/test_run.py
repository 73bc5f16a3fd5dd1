"""The specification: every field counts or is declared inert, bad values are named, presets are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import hydra
import pytest

from starquant.config.run import RunSpec
from starquant.errors import ConfigError
from starquant.sweeps.overrides import LAUNCHER_EXTRAS
from tests.support.specs import CONF, OPTIONS, compose, spec


@pytest.mark.parametrize("choice", [f"{g}={name}" for g, names in OPTIONS.items() for name in names])
def test_every_option_composes_and_validates(choice: str) -> None:
    module, extra = LAUNCHER_EXTRAS.get(choice.removeprefix("launcher="), ("json", ""))
    if find_spec(module) is None:
        pytest.skip(f"the extra '{extra}' is not installed")
    needs = ["calibration.source.path=corpus.txt"] if choice == "calibration=text" else []
    needs += ["model=llada"] if choice.startswith("speed=") else []  # blocks of 32
    needs += ["model=smol"] if choice.startswith("tasks=smol") else []  # other models have no protocol for them
    assert len(spec(choice, *needs).digest()) == 16


def test_text_needs_a_file() -> None:
    with pytest.raises(ConfigError, match=r"calibration.source: path: a source of kind 'text' needs a"):
        spec("calibration=text")


@pytest.mark.parametrize("model", OPTIONS["model"])
def test_every_model_has_a_protocol_for_the_nine_tasks(model: str) -> None:
    run = spec(f"model={model}", "tasks=paper")
    assert len(run.tasks.names) == 9
    for name in run.tasks.names:
        generates = name in ("humaneval", "gsm8k")
        assert (run.model.protocol[name].sampler is not None) == generates


def test_the_default_is_the_papers_method() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        assert hydra.compose("config").method.name == "star_quant"


def test_models_bring_their_suite_and_the_command_line_wins() -> None:
    assert spec("model=llada").tasks.name == "paper"
    assert spec("model=tiny").tasks.name == "testbed"
    assert spec("model=tiny", "tasks=paper").tasks.name == "paper"


def test_presets_of_instruct_models_talk_in_their_template() -> None:
    talking = {model for model in OPTIONS["model"] if spec(f"model={model}").model.chat_template == "auto"}
    assert talking == {
        "llada_instruct",
        "llada_1_5",
        "llada_moe",
        "sdar_8b",
        "sdar_4b",
        "llada2_mini",
        "llada2_1_mini",
        "dream_instruct",
        "dream_coder",
        "diffucoder",
    }


def test_a_template_is_another_experiment_on_the_same_calibration() -> None:
    raw, talking = spec("model=llada"), spec("model=llada", "model.chat_template=auto")
    assert raw.digest() != talking.digest()
    assert raw.calibration_digest() == talking.calibration_digest()
    assert "chat_template" not in raw.identity()["model"]  # records of raw text keep their digest
    alone = [
        spec("model=llada", "tasks=fidelity", f"model.chat_template={value}").digest() for value in ("none", "auto")
    ]
    assert len(set(alone)) == 1  # no prompt of a task


def test_bits_presets_are_what_they_are_called() -> None:
    for name in OPTIONS["bits"]:
        run = spec(f"bits={name}")
        if run.bits.in_blocks:
            assert (run.bits.weights.block, run.bits.activations.block) == (name, "q8_0")
            continue
        widths, _, attention = name.partition("_")
        assert widths == f"w{run.bits.weights.bits}a{run.bits.activations.bits}"
        operands = {"": (16, 16, 16), "softmax_v": (16, 4, 4), "kv8": (8, 16, 8), "kv4": (4, 16, 4)}[attention]
        assert (run.bits.attention.k, run.bits.attention.p, run.bits.attention.v) == operands


def keys_of(section: dict[str, Any], ahead: str = "") -> set[str]:
    """Every key of a section with those below it."""
    below = (keys_of(value, f"{ahead}{key}.") for key, value in section.items() if isinstance(value, dict))
    return {f"{ahead}{key}" for key in section}.union(*below)


@pytest.mark.parametrize("group", ["bits", "speed", "tasks"])  # of the others, what is chosen decides what there is
def test_presets_of_a_group_have_the_same_keys(group: str) -> None:
    """A key that one of them lacks cannot be set on the command line there."""
    keys = {name: keys_of(compose(f"{group}={name}")[group]) for name in OPTIONS[group]}
    every = set().union(*keys.values())
    assert {name: every - some for name, some in keys.items() if every - some} == {}


# What each field is changed to, and whether that is another experiment.
CHANGES = [
    ("model.name", "other", True),
    ("model.path", "some/where", True),
    ("model.testbed", "smol", False),  # the fingerprint tells checkpoints apart
    ("model.revision", "abc", True),
    ("model.dtype", "bfloat16", True),
    ("model.protocol.testbed_facts.mc_num", 17, True),
    ("model.protocol.testbed_facts.cfg_scale", 0.5, True),
    ("model.protocol.testbed_facts.num_fewshot", 1, True),
    ("model.protocol.testbed_arithmetic.sampler.steps", 4, True),
    ("model.protocol.gsm8k.num_fewshot", 3, False),  # a task that is not scored
    ("model.fingerprint", "f", True),
    ("model.chat_template", "auto", True),
    ("model.trajectory.steps", 4, True),
    ("calibration.name", "other", True),
    ("calibration.source.kind", "gsm8k", True),
    ("calibration.source.path", "other", True),
    ("calibration.source.split", "test", True),
    ("calibration.source.segments", 3, True),
    ("calibration.source.length", 9, True),
    ("calibration.states.sampler", "clean", True),
    ("calibration.states.min_ratio", 0.1, True),
    ("calibration.states.max_ratio", 0.9, True),
    ("calibration.states.per_segment", 7, True),
    ("calibration.states", {"sampler": "trajectory", "shares": [0.5, 0.5]}, True),
    ("calibration.inputs", "quantized", True),
    ("calibration.bins", 3, True),
    ("calibration.seed", 3, True),
    ("calibration.threads", 2, True),
    ("calibration.experts.least_tokens", 8, True),
    ("calibration.experts.rare", "round", True),
    ("calibration.fingerprint", "f", True),
    ("fidelity.name", "other", True),
    ("fidelity.source.kind", "gsm8k", True),
    ("fidelity.source.path", "other", True),
    ("fidelity.source.split", "validation", True),
    ("fidelity.source.segments", 3, True),
    ("fidelity.source.length", 9, True),
    ("fidelity.bins", 3, True),
    ("fidelity.states", {"sampler": "uniform"}, True),
    ("fidelity.positions", 3, True),
    ("fidelity.resamples", 3, True),
    ("fidelity.fingerprint", "f", True),
    ("bits.name", "other", True),
    ("bits.weights.bits", 8, True),
    ("bits.weights.symmetric", False, True),
    ("bits.weights.group_size", 32, True),
    ("bits.weights.clip_ratio", 0.9, True),
    ("bits.activations.bits", 8, True),
    ("bits.activations.symmetric", False, True),
    ("bits.activations.clip_ratio", 0.9, True),
    ("bits.attention.q", 4, True),
    ("bits.attention.k", 4, True),
    ("bits.attention.p", 4, True),
    ("bits.attention.v", 4, True),
    ("bits.attention.kv_symmetric", False, False),  # K and V are at 16 bits here
    ("bits.attention.kv_clip_ratio", 0.9, False),
    ("bits.attention.kv_at", {"k": 4, "kv_at": "commit"}, True),
    ("bits.weights.block", {"bits": 4, "group_size": 32, "block": "q4_0"}, True),
    ("bits.activations.block", {"bits": 8, "block": "q8_0"}, True),
    ("bits.tables", "blocks", False),  # embedding and head are at 16 bits here
    ("bits.grid", "common", False),  # the canonical form holds what it comes to
    ("bits.embedding", 8, True),
    ("bits.head", 8, True),
    ("tasks.name", "other", True),
    ("tasks.names", ["testbed_facts"], True),
    ("tasks.limit", 3, True),
    ("tasks.data_dir", "d", True),
    ("tasks.data_fingerprint", "f", True),
    ("tasks.allow_code_execution", True, False),
    ("tasks.allow_weak_sandbox", True, False),
    ("tasks.left_out", {"humaneval": "why"}, False),  # `names` are the tasks that are scored
    ("speed.name", "other", False),  # of an exact evaluation the name says nothing
    ("speed.compile", True, True),
    ("speed.kv_cache", "dual", True),
    ("speed.confidence_threshold", 0.9, True),
    ("speed.mc_num", 8, True),
    ("seed", 1, True),
    ("tracker", {"name": "wandb"}, False),
    ("paths.results", "elsewhere", False),
    ("runtime.device", "cuda", False),
    ("runtime.batch_size", 1, False),
    ("runtime.threads", 1, False),
    ("runtime.blocks", "disk", False),
    ("runtime.packed", "auto", False),
    ("debug.traceback", True, False),
    ("debug.verbose", True, False),
    ("debug.name", "x", False),
    ("reuse", "any", False),
    ("stage", "calibrate", False),
    ("dry_run", True, False),
    ("experiment.name", "x", False),
    ("experiment.benchmark", "efficiency", False),
    ("export.dir", "x", False),
    ("export.format", "gguf", False),
    ("export.dtype", "float32", False),
    ("export.shard_size", "1GB", False),
]


@pytest.mark.parametrize(("path", "value", "counts"), CHANGES, ids=[c[0] for c in CHANGES])
def test_every_field_changes_the_digest_or_is_inert(path: str, value: Any, counts: bool) -> None:
    config = compose()
    before = RunSpec.from_config(config).digest()
    *parents, leaf = path.split(".")
    here = config
    for parent in parents:
        here = here[parent]
    if isinstance(value, dict) and leaf in value:  # fits some bits only
        here.update(value)
    else:
        here[leaf] = value
    if path == "model.path":
        config["model"]["seed"] = None
    assert (RunSpec.from_config(config).digest() != before) == counts


def test_the_table_above_names_every_field() -> None:
    def leaves(value: Any, prefix: str) -> set[str]:
        if isinstance(value, dict):
            return {leaf for key, item in value.items() for leaf in leaves(item, f"{prefix}.{key}" if prefix else key)}
        return {prefix}

    fields = leaves(spec().model_dump(mode="json"), "")
    named = {path for path, _, _ in CHANGES}
    # One example of each protocol and sampler; the tracker as a whole; methods have a test of their own.
    skip = ("model.protocol.", "model.trajectory.", "tracker.", "method.")
    assert {f for f in fields if not f.startswith(skip)} - named == {
        *("model.seed", "calibration.states.shares", "speed.block_length"),
        *("model.engine", "model.checkpoint", "model.file_fingerprint"),  # a test of their own
    }


def test_a_file_of_llama_cpp_counts_by_content_and_beside_its_checkpoint() -> None:
    words = ("method=gguf", "model.engine=llama_cpp", "model.path=m.gguf")
    run = spec(*words)

    def digest(**changes: Any) -> str:
        return run.model_copy(update={"model": run.model.model_copy(update=changes)}).digest()

    assert len({spec("method=rtn").digest(), digest(), digest(file_fingerprint="f"), digest(file_fingerprint="g")}) == 4
    assert digest(seed=None, checkpoint="here") != digest()
    assert run.baseline().digest() == spec("method=none").baseline().digest()
    assert not {"engine", "checkpoint", "file_fingerprint"} & spec().identity()["model"].keys()  # as records have it
    assert "block" not in spec("bits=w4a8").identity()["bits"]["weights"]


def test_shortcuts_are_named_and_judged() -> None:
    assert spec().speed.approximations == spec("speed=compiled").speed.approximations == []
    told = spec("speed=dual_cache", "speed.block_length=4", "speed.mc_num=8").speed.approximations
    assert told == ["dual KV cache", "confidence threshold 0.9", "blocks of 4", "at most 8 draws"]
    parallel = [spec("speed=parallel", f"speed.block_length={length}").digest() for length in (4, 8)]
    assert len({*parallel, spec().digest()}) == 3


NOT_ALLOWED = {
    ("speed=dual_cache",): "speed.block_length: got 32, must divide the 8 tokens of testbed_arithmetic's answers",
    ("speed.block_length=4",): "speed.block_length: is read with kv_cache or confidence_threshold only",
    ("speed.mc_num=7",): "speed.mc_num: got 7, allowed: an even number (two halves give the standard error)",
    ("speed.kv_cache=duel",): "speed.kv_cache: got 'duel', allowed: none, prefix, dual. Did you mean 'dual'?",
    ("speed.kv_cache=dual", "speed.compile=true"): "speed.compile: got true, but kv_cache changes shapes all the time; "
    "allowed: one of them",
    ("speed.kv_cache=dual", "+model.protocol.testbed_programs.sampler.remasking=random"): "speed.kv_cache, "
    "speed.confidence_threshold: model.protocol.testbed_programs.sampler.remasking is 'random', which commits tokens "
    "by chance; allowed: an exact evaluation, or another sampler",
    ("runtime.batch_size=0",): "runtime.batch_size: got 0, allowed: auto, or a whole number from 1 to 65536",
    ("runtime.batch_size=foo",): "runtime.batch_size: got 'foo', allowed: auto, or a whole number from 1 to 65536",
}


@pytest.mark.parametrize("given", NOT_ALLOWED)
def test_speed_that_is_not_allowed_is_one_line(given: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(*given)
    assert str(caught.value) == NOT_ALLOWED[given]


@pytest.mark.parametrize(
    "given",
    [
        ("speed.mc_num=16",),  # the protocols draw no more
        ("speed.mc_num=2", "tasks.names=[testbed_arithmetic]"),
        ("speed=dual_cache", "tasks.names=[testbed_facts]"),
        ("speed=parallel", "tasks=fidelity"),
    ],
)
def test_shortcuts_that_change_nothing_are_none(given: tuple[str, ...]) -> None:
    exact = [word for word in given if word.startswith("tasks")]
    found, plain = spec(*given).canonical(), spec(*exact).canonical()
    assert found.digest() == plain.digest() and found.speed.approximations == []
    assert spec(*given).baseline().digest() == spec(*exact).baseline().digest()


def test_digest_ignores_spelling_and_survives_json() -> None:
    run = spec("+model.protocol.testbed_facts.cfg_scale=0")
    assert run.digest() == spec("+model.protocol.testbed_facts.cfg_scale=0.0").digest()
    assert RunSpec.from_config(json.loads(run.model_dump_json())).digest() == run.digest()


def test_full_precision_has_one_spelling() -> None:
    digests = {
        spec(*o).canonical().digest() for o in (["method=none"], ["bits=w16a16"], ["bits=w16a16", "method=none"])
    }
    assert digests == {spec("bits=w4a4").baseline().digest()}
    assert spec("bits=w4a4").canonical() == spec("bits=w4a4", "calibration=none")


def test_calibration_counts_only_for_methods_that_read_it() -> None:
    few = "calibration.source.segments=3"
    assert spec("method=rtn", few).canonical() == spec("method=rtn").canonical()
    assert spec("method=quarot_rtn", few).canonical() == spec("method=quarot_rtn").canonical()
    assert spec("method=quarot", few).canonical() != spec("method=quarot").canonical()
    with pytest.raises(ConfigError, match="method 'gptq' needs calibration data, got 'none'"):
        spec("method=gptq", "calibration=none")


def test_tmas_takes_the_place_of_the_states_asked_for() -> None:
    states = spec("method=dllmquant_plus").canonical().calibration.states
    assert (states.sampler, states.shares) == ("trajectory", (0.3, 0.2, 0.2, 0.3))
    assert spec("method=dllmquant_plus", "method.tmas=false").canonical().calibration.states.sampler == "uniform"


def test_specifications_are_frozen() -> None:
    run = spec()
    with pytest.raises(Exception, match="frozen"):
        run.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "abc"}, "seed: got 'abc', allowed: valid integer"),
        ({"seed": -1}, "seed: got -1, allowed: greater than or equal to 0"),
        ({"seeed": 1}, "seeed: unknown key; allowed: .* Did you mean 'seed'"),
        (
            {"method": {"name": "smothquant", "algorithm": "smothquant"}},
            "^method.algorithm: got 'smothquant', allowed: awq, .* Did you mean 'smoothquant'",
        ),
        (
            {"method": {"name": "rtn", "algorithm": "rtn", "alpha": 0.5}},
            "^method.alpha: unknown key; allowed: name, algorithm, authors, weights[.]",
        ),
        ({"method": {"name": "rtn"}}, "^method.algorithm: missing; allowed: awq, .*star_quant$"),
        ({"method": {"name": "rtn", "algorithm": ["rtn"]}}, r"^method.algorithm: got \['rtn'\]; allowed: awq"),
        ({"method": {"algorithm": "rtn"}}, "^method.name: missing$"),
        ({"method": {"name": "RTN 2", "algorithm": "rtn"}}, "^method.name: got 'RTN 2', allowed: up to 48 lower-case"),
        ({"method": {"name": "awq", "algorithm": "rtn"}}, "^method.name: got 'awq' for algorithm 'rtn', but another"),
        ({"method": "rtn"}, "^method: got 'rtn', allowed: the options of a method$"),
        (
            {"tasks": {"name": "x", "names": ["testbed_facts"] * 2}},
            "testbed_facts is named more than once",
        ),
        ({"tasks": {"name": "x", "names": []}, "fidelity": {"name": "none"}}, r"tasks.names: got \[\]"),
        ({"calibration": {"name": "none", "samples": 3}}, "calibration.samples: unknown key"),
    ],
)
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunSpec.from_config(compose() | change)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bits.weights.bits=4.0", "bits.weights.bits: got 4.0, allowed: a whole number, written as 4"),
        ("bits.attention.v=8.0", "bits.attention.v: got 8.0, allowed: a whole number, written as 8"),
        ("bits.weights.bits=4.5", "bits.weights.bits: got 4.5, allowed: 2, 3, 4, 8, 16."),
        ("bits.weights.bits='4'", "bits.weights.bits: got '4', allowed: 2, 3, 4, 8, 16."),
        *(
            (
                f"export.shard_size={size}",
                f"export.shard_size: got {got}, allowed: a whole number from 1 to 999999 and KB, MB or GB, such as 1GB",
            )
            for size, got in [
                *(("0", "0"), ("nan", "nan"), ("null", "None"), ("true", "True"), ("1.5", "1.5")),
                *((size, f"'{size}'") for size in ("0KB", "-1GB", "words", "1.5GB", "1TB", "1000000GB")),
            ]
        ),
    ],
)
def test_numbers_of_another_kind_are_one_line(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(word)
    assert str(caught.value) == message


def test_several_problems_are_all_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        RunSpec.from_config(compose() | {"seed": "abc", "reuse": "maybe"})
    assert len(str(caught.value).splitlines()) == 2


def test_validation_needs_neither_torch_nor_hydra() -> None:
    code = (
        "import json, sys; from starquant.config.run import RunSpec; "
        "RunSpec.from_config(json.loads(sys.argv[1])).canonical().digest(); "
        "bad = {'torch', 'transformers', 'hydra', 'wandb', 'lm_eval', 'pandas', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(compose())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
