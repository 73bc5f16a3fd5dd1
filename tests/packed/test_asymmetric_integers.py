"""Packed checkpoints on asymmetric grids: integers give fake quantization's numbers, and read the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from starquant.diffusion import generate
from starquant.errors import CheckpointError
from starquant.evaluation.testbed_tasks import items
from starquant.kernels import integer_linear, weight_offsets
from starquant.models import family_of, load_model, load_tokenizer
from starquant.models.base import MaskedDiffusionModel
from starquant.models.context import Context
from starquant.models.roles import Site
from starquant.packed.description import use_integers
from starquant.packed.export import export
from starquant.quantized.packed_linear import PackedLinear
from starquant.testbed.items import Split
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.methods import FOUR, method_named
from tests.support.models import fresh, fresh_tiny, logits
from tests.support.records import make_record
from tests.support.specs import spec
from tests.support.states import states_of

INPUTS, WEIGHTS = "bits.activations.symmetric=false", "bits.weights.symmetric=false"


def exported(folder: Path, models: list[MaskedDiffusionModel], name: str, *bits: str) -> MaskedDiffusionModel:
    """Quantize two equal models, the first as values; export the second, and return the first."""
    method, widths = method_named(name, *bits)
    states = None if name == "rtn" else states_of(models[0])
    fitted = method.fit(models[0], widths, states)
    for model, packed in zip(models, (False, True), strict=True):
        method.apply(model, fitted, widths, packed=packed)
    export(models[1], make_record(spec()), weights_folder(0), folder)
    return models[0]


def half_masked(model: MaskedDiffusionModel) -> torch.Tensor:
    ids = torch.arange(3, 19).view(2, 8)
    ids[:, 4:7] = model.mask_token_id
    return ids


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


CASES = [
    ("llada_gqa", "rtn", ("bits=w4a4", INPUTS)),
    ("llada_gqa", "rtn", ("bits=w8a8", WEIGHTS)),
    ("llada_gqa", "rtn", ("bits=w3a3", INPUTS, WEIGHTS)),
    ("dream_gqa", "rtn", ("bits=w8a8", INPUTS)),
    ("dream_gqa", "rtn", ("bits=w4a4", WEIGHTS)),
    ("llada_gqa", "star_quant", (*FOUR, INPUTS)),
]


@pytest.mark.parametrize(("architecture", "name", "bits"), CASES)
def test_integers_give_the_same_up_to_rounding(
    architecture: str, name: str, bits: tuple[str, ...], tmp_path: Path
) -> None:
    calibrated = exported(tmp_path / "p", [fresh(architecture) for _ in range(2)], name, *bits)
    loaded = load_model(tmp_path / "p")
    ids = half_masked(loaded)
    expected = logits(calibrated, ids)
    assert torch.equal(logits(loaded, ids), expected)
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    assert use_integers(loaded) == 4 * loaded.config.num_hidden_layers
    alone = logits(loaded, ids)
    assert 0 < apart(alone, expected) < 0.02 and torch.equal(alone.argmax(-1), expected.argmax(-1))
    use_integers(loaded, join="always")
    assert apart(logits(loaded, ids), alone) < 1e-5
    state = loaded.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in state)
    use_integers(loaded, "never")
    assert torch.equal(logits(loaded, ids), expected)
    assert all(m.offsets is None for m in loaded.modules() if isinstance(m, PackedLinear))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded model, asymmetric on both sides of its products."""
    folder = tmp_path_factory.mktemp("both") / "p"
    exported(folder, [fresh_tiny(), fresh_tiny()], "rtn", "bits=w4a4", INPUTS, WEIGHTS)
    return folder


def test_joined_products_are_those_of_each_linear(both: Path) -> None:
    """Of one memory, which moves and casts leave as it was."""
    loaded = load_model(both)
    use_integers(loaded, join="always")
    sites = loaded.block_sites(loaded.trunk().blocks[0])
    site, readers = sites.inputs[Site.QKV], list(sites.readers(Site.QKV).values())
    x = torch.randn(1, 5, readers[0].in_features, generator=torch.Generator().manual_seed(0))
    context = Context((torch.ones(1), torch.ones(1)), None, torch.arange(5)[None] % 2 == 0)
    for dtype in (torch.float32, torch.bfloat16):
        loaded.to(dtype)
        tokens = site(x.to(dtype), context)
        assert len(tokens.products) == 3 and tokens.zero is not None and tokens.sum is not None
        for linear in readers:
            arguments = linear.codes, linear.scale, 4, linear.bias, weight_offsets(linear.codes, linear.zero, 4)
            assert torch.equal(linear(tokens), integer_linear(tokens, *arguments))
            assert linear.offsets._base is site.joined.offsets and linear.offsets.dtype == torch.int32


def test_offsets_follow_a_move(both: Path) -> None:
    """A site that is moved before or after its linears has them where the codes are."""
    loaded = load_model(both)
    assert all(m.offsets is None for m in loaded.modules() if isinstance(m, PackedLinear))  # nobody multiplies integers
    use_integers(loaded)
    loaded.to("meta")
    linears = [m for m in loaded.trunk().blocks.modules() if isinstance(m, PackedLinear)]
    assert {linear.offsets.device.type for linear in linears} == {"meta"}


@pytest.mark.parametrize("which", ["inputs", "both"])
def test_answers_are_the_same_token_for_token(which: str, both: Path, tmp_path: Path) -> None:
    folder = both if which == "both" else tmp_path / "p"
    if which == "inputs":
        exported(folder, [fresh_tiny(), fresh_tiny()], "rtn", "bits=w8a8", INPUTS)
    values, integers = load_model(folder), load_model(folder)
    assert use_integers(integers) == 4 * integers.config.num_hidden_layers
    tokenizer, sampler = load_tokenizer(folder), family_of(values).sampler.of_length(8)
    for item in items("arithmetic", Split.TEST)[:3]:
        prompt = torch.tensor([tokenizer(item.prompt, add_special_tokens=False)["input_ids"]])
        answer = generate(integers, prompt, sampler)
        assert torch.equal(answer, generate(values, prompt, sampler)) and not (answer == values.mask_token_id).any()


@pytest.mark.parametrize("zero", [-1.0, 16.0, torch.nan])
def test_zero_points_out_of_range_are_named(zero: float, both: Path, tmp_path: Path) -> None:
    tensors = load_file(both / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("q_proj.zero"))
    tensors[name][-1] = zero
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((both / "config.json").read_text())
    with pytest.raises(
        CheckpointError, match=rf"{name}: got values that are no codes, allowed: whole numbers, 0 to 15"
    ):
        load_model(tmp_path)
