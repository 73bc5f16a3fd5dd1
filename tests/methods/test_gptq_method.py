"""GPTQ through the whole method: what it gains on held-out states, what its Hessians are made of, what it notes.

The solver itself stands against slow optimal brain quantization in tests/numerics/test_gptq.py.
Shape suffixes: N tokens, D width of a site.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates
from starquant.calibration.walk import BlockVisit
from starquant.config.bits import BitsSpec
from starquant.config.methods.gptq import GPTQOptions
from starquant.errors import ConfigError
from starquant.methods.blockwise import BlockwiseMethod
from starquant.methods.fitted import Fitted, block_part
from starquant.models.base import MaskedDiffusionModel
from starquant.models.layers import site_input
from starquant.models.roles import ROLES, BlockSites, Role, Site
from starquant.numerics import gptq, mse_clip
from starquant.quantized import ActivationQuantizer, FakeQuantLinear
from starquant.quantized.install import weight_format
from tests.support.formulas import lost, rounded
from tests.support.methods import method_named
from tests.support.models import fresh, fresh_tiny, logits, trajectory
from tests.support.specs import spec
from tests.support.states import inputs_of, states_of, tiny_states


@pytest.fixture(scope="module")
def training(tiny: MaskedDiffusionModel, tiny_tokenizer: object) -> CalibrationStates:
    """States to calibrate the embedded model on."""
    return tiny_states(tiny, tiny_tokenizer, "train", 48)


def installed(name: str, states: CalibrationStates | None, *overrides: str) -> MaskedDiffusionModel:
    """The embedded model under a method."""
    method, bits = method_named(name, *overrides)
    model = fresh_tiny()
    method.apply(model, method.fit(model, bits, states), bits)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("bits.weights.symmetric=false", "method.weights.mse_clip=false"),
        ("bits.weights.bits=3", "method.weights.act_order=true", "bits.weights.group_size=32"),
    ],
    ids=["default", "asymmetric", "three bits in groups"],
)
def test_held_out_objective_is_smaller_than_that_of_rounding(
    settings: tuple[str, ...],
    training: CalibrationStates,
    held_out: dict[str, Tensor],
) -> None:
    """tr(dW H dW^T) on validation items, also against rounding with the same clipping."""
    original, solved = fresh_tiny(), installed("gptq", training, "bits=w4a16", *settings)
    of_bits = [s for s in settings if s.startswith("bits.")]
    clips = ["false"] if "method.weights.mse_clip=false" in settings else ["false", "true"]
    for clip in clips:
        plain = installed("rtn", None, "bits=w4a16", *of_bits, f"method.weights.mse_clip={clip}")
        ours, theirs, better = 0.0, 0.0, 0
        for name, info in original.linears().items():
            weight = info.module.weight.detach().double()
            here, there = (
                lost(held_out[name], m.get_submodule(name).weight.detach().double() - weight) for m in (solved, plain)
            )
            ours, theirs, better = ours + here, theirs + there, better + (here < there)
        assert ours < 0.8 * theirs
        assert better > 0.85 * len(original.linears())


@pytest.mark.parametrize(
    ("architecture", "group", "mse", "act_order"),
    [
        ("llada_gqa", None, "true", "true"),
        ("llada_gqa", None, "false", "false"),
        ("llada_gqa", 16, "true", "false"),
        ("llada_mha", 32, "false", "true"),
    ],
)
def test_installed_weights_are_codes_on_their_grid(
    architecture: str, group: int | None, mse: str, act_order: str
) -> None:
    settings = [f"method.weights.mse_clip={mse}", f"method.weights.act_order={act_order}"]
    settings += [] if group is None else [f"bits.weights.group_size={group}"]
    method, bits = method_named("gptq", "bits=w4a4", *settings)
    model = fresh(architecture)
    before = {name: info.module.weight.detach().clone() for name, info in model.linears().items()}
    learned = method.fit(model, bits, states_of(model))
    assert learned.notes == []
    method.apply(model, learned, bits)
    shrunk = 0
    for name, info in model.linears().items():
        tensors, role = learned.get(block_part(info.block)), info.role.value
        weight = info.module.weight.detach().double()
        runs = weight.reshape(len(weight), -1, group or weight.shape[1])
        scale = tensors[f"{role}.scale"].double().reshape(len(weight), -1, 1)
        codes = runs / scale
        assert float((codes - codes.round()).abs().max()) < 1e-4
        assert set(codes.round().unique().tolist()) <= set(range(-8, 8))
        assert torch.equal(codes.round(), tensors[f"{role}.codes"].double().reshape(codes.shape) - 8)
        ratio = scale / (before[name].double().reshape(runs.shape).abs().amax(-1, keepdim=True) / 7)
        assert float(ratio.max()) < 1 + 1e-5
        shrunk += int((ratio < 0.995).sum())
    assert (shrunk > 0) == (mse == "true")


def agree(
    model: MaskedDiffusionModel, learned: Fitted, inputs: dict[str, Tensor], bits: BitsSpec, act_order: bool = False
) -> dict[str, float]:
    """Share of each linear's codes that GPTQ gives with the Hessian of naively captured inputs."""
    fmt, found = weight_format(bits.weights), {}
    for name, info in model.linears().items():
        weight, x_ND = info.module.weight.detach(), inputs[name]
        solved = gptq(weight, x_ND.T @ x_ND, fmt, act_order=act_order, clip=mse_clip(weight, fmt))
        codes = solved.quantized.to_tensors("w")["w.codes"]
        found[name] = float((codes == learned.get(block_part(info.block))[f"{info.role.value}.codes"]).double().mean())
    return found


@pytest.mark.parametrize("act_order", [False, True])
def test_hessians_are_those_of_what_each_linear_reads(act_order: bool) -> None:
    method, bits = method_named("gptq", "bits=w4a4", f"method.weights.act_order={str(act_order).lower()}")
    model = fresh("llada_gqa")
    learned = method.fit(model, bits, states_of(model))
    inputs = inputs_of(model, states_of(model))
    shares = agree(model, learned, inputs, bits, act_order)
    assert min(shares.values()) > 0.99, shares
    assert min(agree(model, learned, inputs, bits, not act_order).values()) < 0.98


def quantized_inputs(model: MaskedDiffusionModel, states: CalibrationStates) -> dict[str, Tensor]:
    """What stands in front of every site's quantizer in an installed model, at visible tokens, by linear."""
    found: dict[str, list[Tensor]] = {info.site: [] for info in model.linears().values()}
    for batch in states.batches:
        handles = [
            model.get_submodule(site).register_forward_pre_hook(
                lambda _, args, s=site, b=batch: found[s].append(site_input(args)[b.visible_BL].double())
            )
            for site in found
        ]
        with torch.no_grad():
            model(batch.ids_BL, attention_mask=batch.visible_BL)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(found[info.site]) for name, info in model.linears().items()}


@pytest.mark.parametrize("attention", [(), ("bits.attention.k=4", "bits.attention.v=4")], ids=["plain", "kv"])
def test_sequential_hessians_are_those_of_the_quantized_model_in_front(attention: tuple[str, ...]) -> None:
    """Every site was solved on what the finished quantized model gives to it, attention operands included."""
    method, bits = method_named("gptq", "bits=w4a4", *attention)
    model, quantized = fresh("llada_gqa"), fresh("llada_gqa")
    fed = dataclasses.replace(states_of(model), inputs="quantized")
    learned = method.fit(model, bits, fed)
    method.apply(quantized, learned, bits)
    shares = agree(model, learned, quantized_inputs(quantized, fed), bits)
    assert min(shares.values()) > 0.99, shares
    assert min(agree(model, learned, inputs_of(model, fed), bits).values()) < 0.95


def test_later_sites_of_a_block_see_the_earlier_ones_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[Site, ...], list[bool], list[bool]]] = []
    collect = BlockVisit.collect

    def spy(visit: BlockVisit, plan: object, sites: tuple[Site, ...] = tuple(Site)) -> object:
        linears = [isinstance(visit.sites.linears[role], FakeQuantLinear) for role in ROLES]
        seen.append((tuple(sites), linears, [isinstance(visit.sites.inputs[s], ActivationQuantizer) for s in Site]))
        return collect(visit, plan, sites)

    monkeypatch.setattr(BlockVisit, "collect", spy)
    method, bits = method_named("gptq", "bits=w4a4")
    model = fresh("llada_gqa")
    method.fit(model, bits, states_of(model))
    untouched = (tuple(Site), [False] * 7, [False] * 4)
    assert seen == [untouched] * 2
    seen.clear()
    method.fit(model, bits, dataclasses.replace(states_of(model), inputs="quantized"))
    order = list(Site)
    assert [sites for sites, _, _ in seen] == [(site,) for site in order] * 2
    for (site,), linears, quantizers in seen:
        assert linears == [order.index(role.site) < order.index(site) for role in ROLES]
        assert quantizers == [order.index(other) < order.index(site) for other in order]


def few_tokens(model: MaskedDiffusionModel) -> CalibrationStates:
    """One segment of five tokens: every Hessian has rank five."""
    states = states_of(model)
    batch = states.batches[0]
    cut = dataclasses.replace(
        batch, ids_BL=batch.ids_BL[:1, :5], visible_BL=batch.visible_BL[:1, :5], ratio_B=batch.ratio_B[:1]
    )
    return dataclasses.replace(states, batches=[cut])


@pytest.mark.parametrize("percdamp", ["0.01", "1e-17"])
def test_singular_hessians_are_damped(percdamp: str) -> None:
    """At the usual damping nothing has to be raised; where the damping drowns, it is, and noted."""
    method, bits = method_named("gptq", "bits=w4a4", f"method.weights.percdamp={percdamp}")
    model = fresh("llada_mha")
    learned = method.fit(model, bits, few_tokens(model))
    raised = {note["where"]: note["damping"] for note in learned.notes}
    assert {note["what"] for note in learned.notes} <= {"damping raised"}
    assert set(raised) == (set() if percdamp == "0.01" else set(model.linears()))
    assert all(1e-17 < damping <= 1.0 for damping in raised.values())
    method.apply(model, learned, bits)
    assert bool(torch.isfinite(logits(model, trajectory(fresh("llada_mha")))).all())


def test_inputs_never_seen_are_noted_and_their_weights_zero() -> None:
    method, bits = method_named("gptq", "bits=w4a4")
    model = fresh("llada_gqa")
    with torch.no_grad():
        model.block_sites(model.trunk().blocks[1]).norms[Site.QKV].weight[[3, 50]] = 0.0
    learned = method.fit(model, bits, states_of(model))
    names = [n for n, i in model.linears().items() if i.block == 1 and i.role.site is Site.QKV]
    assert len(names) == 3
    assert learned.notes == [{"what": "dead inputs, weights set to zero", "where": name, "count": 2} for name in names]
    method.apply(model, learned, bits)
    for name in names:
        assert not model.get_submodule(name).weight[:, [3, 50]].any()
    assert bool(torch.isfinite(logits(model, torch.tensor([[1, 2, 199]]))).all())


@pytest.mark.parametrize("percdamp", ["0", "-0.01", "abc"])
def test_damping_out_of_range_is_named(percdamp: str) -> None:
    with pytest.raises(ConfigError, match=r"^method\.weights\.percdamp: got") as caught:
        spec("method=gptq", f"method.weights.percdamp={percdamp}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "solver"), [("gptq", "rtn"), ("rtn", "gptq")])
def test_the_two_solvers_have_a_method_each(name: str, solver: str) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.weights: name: got '{solver}', allowed: {name}"):
        spec(f"method={name}", f"method.weights.name={solver}")


def test_groups_that_do_not_divide_are_refused_before_anything_is_run() -> None:
    method, bits = method_named("gptq", "bits=w4a4", "bits.weights.group_size=64")
    with pytest.raises(ConfigError, match=r"^bits\.weights\.group_size: got 64, which does not divide the 96 inputs"):
        method.fit(fresh("llada_gqa"), bits, None)


def test_block_size_changes_nothing() -> None:
    found = []
    for size in (7, 128):
        method, bits = method_named("gptq", "bits=w4a4", f"method.weights.block_size={size}")
        model = fresh("llada_gqa")
        found.append(method.fit(model, bits, states_of(model)))
    for part in found[0].parts():
        for key, value in found[0].get(part).items():
            assert (value == found[1].get(part)[key]).double().mean() > 0.999, key


@torch.no_grad()
def test_mse_clip_serves_rounding_too() -> None:
    """The clip of each row, searched again from the weights at installation, is the one with the least p-norm."""
    plain, clipped, original = (fresh("llada_gqa") for _ in range(3))
    for model, clip in ((plain, "false"), (clipped, "true")):
        method, bits = method_named("rtn", "bits=w4a4", f"method.weights.mse_clip={clip}")
        method.apply(model, method.fit(model, bits), bits)
    for name, info in original.linears().items():
        weight: Tensor = info.module.weight.detach()
        before, after = (
            (m.get_submodule(name).weight.detach() - weight).abs().pow(2.4).sum(1) for m in (plain, clipped)
        )
        assert bool((after <= before * (1 + 1e-5)).all())
        assert float(after.sum()) < float(before.sum())
        assert float((plain.get_submodule(name).weight - rounded(weight)).abs().max()) < float(weight.abs().max()) / 6


class Clipping(BlockwiseMethod[GPTQOptions]):
    """Changes weights where nothing may change them any more."""

    def compensate(self, sites: BlockSites, tensors: dict[str, Tensor], bits: BitsSpec) -> None:
        sites.linears[Role.UP].weight.data.clamp_(-0.01, 0.01)


def test_weights_that_are_solved_may_not_change() -> None:
    """The codes would be of other weights: whatever is clipped then would change no result."""
    model, bits, method = fresh("llada_gqa"), spec("bits=w4a4").bits, Clipping(GPTQOptions(name="clipping"))
    with pytest.raises(RuntimeError, match="`compensate` changed weights that GPTQ had solved: up_proj"):
        method.apply(model, method.fit(model, bits, states_of(model)), bits)
