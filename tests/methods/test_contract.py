"""What every method and variant must keep, on LLaDA with MHA, LLaDA with GQA and Dream with GQA.

A new one is covered by its YAML; nothing here names one, but for a floor of its own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from starquant.calibration.batches import CalibrationStates
from starquant.config.bits import BitsSpec
from starquant.config.fields import Spec
from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.errors import ConfigError, RecordError
from starquant.methods.base import Method
from starquant.methods.blockwise import BlockwiseMethod
from starquant.methods.fitted import Fitted, block_part
from starquant.models.base import MaskedDiffusionModel
from starquant.numerics import sqnr_db
from starquant.quantized import FakeQuantLinear
from tests.support.methods import FOUR, first_fit, fitted_once, method_named
from tests.support.models import ARCHITECTURES, fresh, logits, trajectory
from tests.support.specs import OPTIONS, compose, spec
from tests.support.states import states_of

W8A8_FLOOR_DB = 20.0  # the models above are random, which is harder than trained: RTN reaches 25.6 to 29
CLIPPING_FLOOR_DB = 15.0  # a tenth of every token's range is cut, whatever the bits
DROPPING_FLOOR_DB = 6.0  # no direction of a random model is idle: a gate of 1/32 alone costs 15 dB a site
OWN_FLOORS_DB = {"freeact": 4.0}  # gates at the down projections of two random blocks, clips at four epochs: 4.36


#: GQA is Dream's as well: LLaDA's by itself among the slow ones.
USUAL = [name for name in ARCHITECTURES if name != "llada_gqa"]
KINDS = [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in ARCHITECTURES]

SITES = ("all", "residual")
NAMES = [name for name in OPTIONS["method"] if name not in ("packed", "gguf")]  # files as they are

#: What asks for a fit of its own: each method on one architecture, in turn; on the others among the slow ones.
IN_TURN = [
    pytest.param(name, architecture, marks=() if architecture == USUAL[i % len(USUAL)] else pytest.mark.slow)
    for i, name in enumerate(NAMES)
    for architecture in ARCHITECTURES
]


@pytest.fixture(params=KINDS)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fitted(name: str, architecture: str) -> tuple[Method, BitsSpec, MaskedDiffusionModel, Fitted]:
    return *method_named(name, *FOUR), fresh(architecture), fitted_once(name, architecture)


def test_fitting_changes_nothing(name: str, architecture: str) -> None:
    _, left_changed = first_fit(name, architecture)
    assert left_changed == []


@pytest.mark.parametrize(("name", "architecture"), IN_TURN)
def test_fitting_is_deterministic(name: str, architecture: str) -> None:
    method, bits = method_named(name, *FOUR)
    first, model = fitted_once(name, architecture), fresh(architecture)
    second = method.fit(model, bits, states_of(model))
    assert first.parts() == second.parts()
    assert first.notes == second.notes
    for part in first.parts():
        ours, theirs = first.get(part), second.get(part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_exactly_the_declared_linears_are_touched(fitted: Any, name: str) -> None:
    method, bits, model, learned = fitted
    declared = set(model.linears())
    entries = method.apply(model, learned, bits)
    reported = {e.name for e in entries if e.kind == "linear" and (e.weight_bits or 16) < 16}
    found = {n for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
    assert reported == found
    assert found == (set() if name == "none" else declared)
    assert {e.name for e in entries if e.kind == "linear"} == declared


def test_at_16_bits_the_function_is_unchanged_along_a_trajectory(fitted: Any, architecture: str) -> None:
    """What was learned for 4 bits is applied without rounding."""
    method, _, model, learned = fitted
    reference = fresh(architecture)
    method.apply(model, learned, spec("bits=w16a16").bits)
    for ids in trajectory(reference):
        exact, got = logits(reference, ids[None]).double(), logits(model, ids[None]).double()
        assert float((exact - got).norm() / exact.norm()) <= 1e-4


def test_hidden_states_come_back_in_the_original_basis(fitted: Any, architecture: str) -> None:
    method, _, model, learned = fitted
    ids = trajectory(fresh(architecture))[3][None]
    method.apply(model, learned, spec("bits=w16a16").bits)
    with torch.no_grad():
        exact = fresh(architecture)(ids, output_hidden_states=True).hidden_states[:-1]
        got = model(ids, output_hidden_states=True).hidden_states[:-1]
    for before, after in zip(exact, got, strict=True):
        torch.testing.assert_close(model.original_basis(after), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "architecture"), IN_TURN)
def test_eight_bits_stay_close(name: str, architecture: str) -> None:
    method, bits = method_named(name, "bits=w8a8")
    model, reference = fresh(architecture), fresh(architecture)
    method.apply(model, method.fit(model, bits, states_of(model)), bits)
    ids = trajectory(reference)
    found = sqnr_db(logits(reference, ids), logits(model, ids))
    clips = bits.activations.clip_ratio < 1.0
    floor = DROPPING_FLOOR_DB if method.drops else CLIPPING_FLOOR_DB if clips else W8A8_FLOOR_DB
    assert found is None or found > OWN_FLOORS_DB.get(name, floor)


def test_saved_and_loaded_gives_identical_logits(fitted: Any, architecture: str, tmp_path: Path) -> None:
    method, bits, model, learned = fitted
    learned.save(tmp_path)
    method.apply(model, learned, bits)
    again = fresh(architecture)
    method.apply(again, Fitted.load(tmp_path), bits)
    ids = trajectory(fresh(architecture))
    assert torch.equal(logits(model, ids), logits(again, ids))


@pytest.mark.parametrize("name", [n if n in METHODS else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_feeding_quantized_inputs_works_and_matters(name: str) -> None:
    method, bits = method_named(name, *FOUR)
    if not method.options.needs_calibration:
        pytest.skip("reads no states")
    model = fresh("llada_mha")
    states = states_of(model)
    fed = CalibrationStates(states.batches, states.mask_id, states.bins, inputs="quantized")
    first, second = fitted_once(name, "llada_mha"), method.fit(model, bits, fed)
    last = block_part(len(model.trunk().blocks) - 1)
    ours, theirs = first.get(last), second.get(last)
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    method.apply(model, second, bits)
    assert bool(torch.isfinite(logits(model, trajectory(fresh("llada_mha")))).all())


def test_a_model_is_quantized_once_and_not_saved_as_if_it_were_not(fitted: Any, name: str, tmp_path: Path) -> None:
    method, bits, model, learned = fitted
    method.apply(model, learned, bits)
    if name == "none":
        return
    with pytest.raises(ConfigError, match="a method has been applied to this model already"):
        method.apply(model, learned, bits)
    with pytest.raises(ConfigError, match="this model is quantized"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_fitted_of_nothing_is_refused(name: str) -> None:
    method, bits = method_named(name, *FOUR)
    if not method.options.needs_calibration:
        pytest.skip("nothing is learned")
    with pytest.raises(RecordError, match="block_000: nothing was fitted for it"):
        method.apply(fresh("llada_mha"), Fitted(), bits)


def test_states_that_are_needed_are_asked_for(name: str) -> None:
    method, bits = method_named(name, *FOUR)
    if not method.options.needs_calibration:
        pytest.skip("reads no states")
    with pytest.raises(ConfigError, match=f"method '{name}' needs calibration states, got None"):
        method.fit(fresh("llada_mha"), bits)


def changed(value: Any, annotation: Any) -> Iterator[Any]:
    """Other values that a field might take."""
    if get_origin(annotation) is Literal:
        yield from (other for other in get_args(annotation) if other != value)
    elif isinstance(value, bool):
        yield not value
    elif value == "auto":
        yield from (True, False)
    elif isinstance(value, int):
        yield value + 1
    elif isinstance(value, float):
        yield from (value * 0.5, value * 0.99) if value else (0.25,)
    elif isinstance(value, tuple):
        yield value[:-1]
        yield value + value[:1]
    elif value is None:
        yield from (0.5, 1)


def fields_of(options: Spec, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, bool]]:
    """Every (path, other values, inert) of a method's options; `authors` is tests/config/test_grids.py's."""
    for key, field in type(options).model_fields.items():
        if key == "authors":
            continue
        value = getattr(options, key)
        extra = field.json_schema_extra
        inert = isinstance(extra, dict) and bool(extra.get("inert"))
        if isinstance(value, Spec):
            yield from fields_of(value, (*path, key))
        elif (*path, key) not in (("name",), ("algorithm",)):
            yield (*path, key), list(changed(value, field.annotation)), inert


@functools.cache
def options_of(preset: str) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """A preset's options, and those of which another value is allowed; each must change the digest, or be inert."""
    composed = compose(f"method={preset}", "calibration.inputs=quantized")  # which propagation needs
    base, every, free = RunSpec.from_config(composed), set[tuple[str, ...]](), set[tuple[str, ...]]()
    for path, values, inert in fields_of(base.method):
        every.add(path)
        for value in values:
            config = copy.deepcopy(composed)
            here = config["method"]
            for key in path[:-1]:
                here = here[key]
            assert path[-1] in here, f"{'.'.join(path)} is missing in conf/method/{preset}.yaml"
            here[path[-1]] = value
            try:
                other = RunSpec.from_config(config)
            except ConfigError as error:
                assert ".".join(path[:1]) in str(error), error
                continue
            if value is False and getattr(base.method, path[-1], None) == "auto":
                assert other.canonical().digest() == base.canonical().digest()  # what "auto" is at these bits
                continue
            free.add(path)
            assert (other.digest() == base.digest()) == inert, path
    return every, free


def test_every_option_changes_the_digest_or_is_inert(name: str) -> None:
    """What a preset's other options fix (a solver, what a structure rules out) is free in a preset beside it."""
    every, _ = options_of(name)
    algorithm = spec(f"method={name}").method.algorithm
    beside = [preset for preset in NAMES if spec(f"method={preset}").method.algorithm == algorithm]
    fixed = {path for path in every if not any(path in options_of(preset)[1] for preset in beside)}
    assert fixed <= {("weights", "name"), ("weights", "propagation"), ("transform", "sites")}, f"{fixed} has one value"


def test_sites_of_a_shared_transform_change_the_digest() -> None:
    """No preset has a shared one."""
    shared = "method.transform.structure=shared", "method.residual_rotation=hadamard"
    digests = {spec("method=star_quant", *shared, f"method.transform.sites={sites}").digest() for sites in SITES}
    assert len(digests) == len(SITES)


@pytest.mark.parametrize("algorithm", METHODS)
def test_presets_are_the_defaults(algorithm: str) -> None:
    """A method built in code and the one its YAML describes are the same, but for the grid that the YAML names."""
    preset = spec(f"method={algorithm}").method
    assert METHODS.options(algorithm)(name=algorithm, authors=preset.authors) == preset


def test_options_say_what_is_so(fitted: Any, name: str) -> None:
    method, _, model, learned = fitted
    assert method.options.reference
    before = copy.deepcopy(model.state_dict())
    method.apply(model, learned, spec("bits=w16a16").bits)
    if not method.options.transforms:  # 16 bits is then taken for full precision
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_learns_asks_for_states(name: str) -> None:
    """`learn` never runs for options that need no calibration: its method would silently be its parent."""
    method, _ = method_named(name)
    learns = isinstance(method, BlockwiseMethod) and type(method).learn is not BlockwiseMethod.learn
    assert method.options.needs_calibration or not learns
