"""DLLMQuant+ and ++: each addition changes what it should and nothing else; without them they are AWQ and QuaRot.

Shape suffixes: B batch, L sequence, N tokens, D width of a site, K value heads, E head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates
from starquant.calibration.site_statistics import SiteStatistics
from starquant.calibration.walk import BlockVisit
from starquant.config.bits import BitsSpec
from starquant.methods.base import Method
from starquant.methods.fitted import Fitted, block_part
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Role, Site
from starquant.numerics import gptq, mse_clip
from starquant.quantized import QuantizedAttentionCore
from starquant.quantized.install import weight_format
from tests.support.formulas import GRID, candidate, lost, rounded
from tests.support.methods import method_named
from tests.support.models import fresh, logits, trajectory
from tests.support.specs import spec
from tests.support.states import inputs_of, site_inputs, states_of

BASES = {"dllmquant_plus": "awq", "dllmquant_plus_plus": "quarot"}
GQA = [(name, "llada_gqa") for name in BASES]
COMMON = "bits.grid=common"
KV = ("bits=w4a4", "bits.attention.v=4", "bits.attention.k=4")


def only(*kept: str) -> list[str]:
    """Overrides that leave on the additions named."""
    return [f"method.{name}={str(name in kept).lower()}" for name in ("tmas", "cgq", "ia_aq")]


def fit(name: str, architecture: str, *overrides: str) -> tuple[Method, BitsSpec, Fitted]:
    method, bits = method_named(
        name, *(overrides if any(o.startswith("bits=") for o in overrides) else (*KV, *overrides))
    )
    model = fresh(architecture)
    return method, bits, method.fit(model, bits, states_of(model))


def certainty(model: MaskedDiffusionModel, states: CalibrationStates) -> list[Tensor]:
    """Weight of every visible token, m + sqrt(conf), from whole forward passes, batch by batch."""
    weights = []
    for batch in states.batches:
        with torch.no_grad():
            logits_BLV = model(batch.ids_BL, attention_mask=batch.visible_BL).logits.double()
        conf_BL = logits_BLV.softmax(-1).amax(-1)
        if model.logit_offset == -1:  # position i is predicted at i - 1, the first by itself
            conf_BL = torch.cat((conf_BL[:, :1], conf_BL[:, :-1]), dim=1)
        m_BL = torch.where(batch.ids_BL == model.mask_token_id, 1.0, 0.7).double()
        weights.append((m_BL + conf_BL.sqrt())[batch.visible_BL])
    return weights


@pytest.mark.parametrize(("name", "architecture"), [*GQA, ("dllmquant_plus", "dream_gqa")])
def test_without_the_additions_they_are_awq_and_quarot_bit_for_bit(name: str, architecture: str) -> None:
    ids, outputs, fits = trajectory(fresh(architecture)), [], []
    for method_name, overrides in ((name, only()), (BASES[name], [])):
        method, bits, learned = fit(method_name, architecture, COMMON, *overrides)
        model = fresh(architecture)
        method.apply(model, learned, bits)
        outputs.append(logits(model, ids))
        fits.append(learned)
    assert torch.equal(*outputs)
    assert fits[0].parts() == fits[1].parts()
    assert fits[0].notes == fits[1].notes
    for part in fits[0].parts():
        ours, theirs = fits[0].get(part), fits[1].get(part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", BASES)
def test_each_addition_changes_its_own_tensors_only(name: str) -> None:
    _, _, plain = fit(name, "llada_gqa", *only())
    _, _, tmas = fit(name, "llada_gqa", *only("tmas"))
    _, _, cgq = fit(name, "llada_gqa", *only("cgq"))
    _, _, ia_aq = fit(name, "llada_gqa", *only("ia_aq"))
    _, _, both = fit(name, "llada_gqa", *only("cgq", "ia_aq"))
    blocks = [part for part in plain.parts() if part != "ends"]
    for key, value in plain.get("ends").items():
        assert all(torch.equal(value, other.get("ends")[key]) for other in (tmas, cgq, ia_aq, both))
    moved = 0
    for part in blocks:
        base = plain.get(part)
        assert all(torch.equal(base[key], tmas.get(part)[key]) for key in base)  # TMAS is the states' business
        assert cgq.get(part).keys() == base.keys()
        moved += sum(not torch.equal(base[key], cgq.get(part)[key]) for key in base)
        found = ia_aq.get(part)
        assert found.keys() == {*base, "v.scale"}
        assert all(torch.equal(base[key], found[key]) for key in base)
        assert both.get(part).keys() == found.keys()
        weights = {key: value for key, value in both.get(part).items() if key != "v.scale"}
        assert all(torch.equal(cgq.get(part)[key], weights[key]) for key in weights)
        if name == "dllmquant_plus_plus":  # no scale of AWQ's stands between V and its scales
            assert torch.equal(both.get(part)["v.scale"], found["v.scale"])
    assert moved > 0


@pytest.mark.parametrize("name", BASES)
def test_tmas_sets_the_states_of_the_run(name: str) -> None:
    asked = spec(f"method={name}").calibration
    on, off = (spec(f"method={name}", f"method.tmas={switch}").canonical() for switch in ("true", "false"))
    assert asked.states.sampler == "uniform"
    assert off.calibration == asked
    assert on.calibration.states.sampler == "trajectory"
    assert on.calibration.states.shares == (0.3, 0.2, 0.2, 0.3)
    assert on.calibration.states.per_segment == asked.states.per_segment
    assert on.calibration.model_copy(update={"states": asked.states}) == asked
    assert on.method.model_copy(update={"tmas": False}) == off.method
    assert on.digest() != off.digest()


@pytest.mark.parametrize(("name", "architecture"), [*GQA, ("dllmquant_plus", "dream_gqa")])
def test_second_moments_are_of_certainty_weighted_tokens(
    name: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sum of (w x)(w x)^T, x in the basis that the method has put the block in; moments stay unweighted."""
    found: list[dict[Site, SiteStatistics]] = []
    collect = BlockVisit.collect

    def kept(visit: BlockVisit, *args: Any, **kw: Any) -> dict[Site, SiteStatistics]:
        seen = collect(visit, *args, **kw)
        found.append(dict(seen))  # the solver empties its own
        return seen

    monkeypatch.setattr(BlockVisit, "collect", kept)
    source = fresh(architecture)
    states = states_of(source)
    total = {}
    for switch in ("cgq", ""):
        found.clear()
        method, _, learned = fit(name, architecture, "bits=w4a16", *only(switch))
        total[switch] = [{site: s[site].second_moment() for site in Site} for s in found]
    seen = fresh(architecture)
    if name == "dllmquant_plus_plus":
        method.apply(seen, learned, spec("bits=w16a16").bits)  # the rotated basis
    inputs = inputs_of(seen, states)
    weight_N = torch.cat(certainty(source, states))
    assert len(total["cgq"]) == len(source.trunk().blocks)
    for block in range(len(source.trunk().blocks)):
        for site in Site:
            x_ND = site_inputs(seen, inputs, block, site)
            for switch, weights in (("cgq", weight_N), ("", torch.ones_like(weight_N))):
                wx_ND = x_ND * weights[:, None]
                moment = total[switch][block][site]
                assert moment.count == len(x_ND)
                wanted = wx_ND.T @ wx_ND
                assert float((moment.mean * moment.count - wanted).norm() / wanted.norm()) < 1e-4


def test_plus_searches_with_the_weighted_output_error() -> None:
    """Magnitudes are those of plain AWQ, errors those of weighted tokens."""
    _, _, learned = fit("dllmquant_plus", "llada_gqa", "bits=w4a16", COMMON, "method.clip=false", *only("cgq"))
    model = fresh("llada_gqa")
    inputs, states = inputs_of(model, states_of(model)), states_of(model)
    weight_N = torch.cat(certainty(model, states))[:, None]
    for index, block in enumerate(model.trunk().blocks):
        sites = model.block_sites(block)
        for site in Site:
            x_ND = site_inputs(model, inputs, index, site)
            weights = [linear.weight.detach().double() for linear in sites.readers(site).values()]
            scale_D = learned.get(block_part(index))[f"{site.value}.scale"].double()
            errors, chosen = [], None
            for step in range(GRID):
                tried_D = candidate(sites, site, x_ND, step / GRID)
                deltas = [rounded(w * tried_D) / tried_D - w for w in weights]
                errors.append(sum(lost(x_ND * weight_N, delta) for delta in deltas))
                chosen = step if torch.allclose(tried_D, scale_D, rtol=1e-4) else chosen
            assert chosen is not None
            assert errors[chosen] <= min(errors) * (1 + 1e-4)


def test_plus_plus_solves_with_the_weighted_hessian() -> None:
    method, bits, learned = fit("dllmquant_plus_plus", "llada_gqa", "bits=w4a16", *only("cgq"))
    source, exact = fresh("llada_gqa"), fresh("llada_gqa")
    method.apply(exact, learned, spec("bits=w16a16").bits)
    inputs, fmt = inputs_of(exact, states_of(source)), weight_format(bits.weights)
    weight_N = torch.cat(certainty(source, states_of(source)))[:, None]
    plain = []
    for name, info in exact.linears().items():
        weight, codes = info.module.weight.detach(), learned.get(block_part(info.block))[f"{info.role.value}.codes"]
        for factor_N in (weight_N, torch.ones_like(weight_N)):
            x_ND = inputs[name] * factor_N
            solved = gptq(weight, x_ND.T @ x_ND, fmt, clip=mse_clip(weight, fmt)).quantized.to_tensors("w")["w.codes"]
            share = float((solved == codes).double().mean())
            if factor_N is weight_N:
                assert share > 0.99, name
            else:
                plain.append(share)
    assert min(plain) < 0.98


@pytest.mark.parametrize(("name", "architecture"), [*GQA, ("dllmquant_plus_plus", "dream_gqa")])
def test_static_value_scales_land_in_every_attention(name: str, architecture: str) -> None:
    """In the units V has once the block is rewritten: 0.8 to 1 times max|V| / 7, channel by channel."""
    method, bits, learned = fit(name, architecture)
    model, exact = fresh(architecture), fresh(architecture)
    method.apply(model, learned, bits)
    method.apply(exact, learned, spec("bits=w16a16").bits)
    values: dict[int, list[Tensor]] = {index: [] for index in range(len(exact.trunk().blocks))}
    for index, block in enumerate(exact.trunk().blocks):
        exact.block_sites(block).linears[Role.V].register_forward_hook(
            lambda _, __, out, i=index: values[i].append(out)
        )
    states = states_of(exact)
    with torch.no_grad():
        for batch in states.batches:
            exact(batch.ids_BL, attention_mask=batch.visible_BL)
    shrunk = 0
    for index, block in enumerate(model.trunk().blocks):
        attention = model.block_sites(block).attention
        assert isinstance(attention.core, QuantizedAttentionCore)
        assert attention.core.formats["v"].bits == 4
        scale_KE = attention.core.v_scale_KE
        assert torch.equal(scale_KE, learned.get(block_part(index))["v.scale"])
        visible = torch.cat([v[b.visible_BL] for v, b in zip(values[index], states.batches, strict=True)])
        most_KE = visible.abs().amax(0).view(attention.n_kv_heads, attention.head_dim)
        ratio = scale_KE / (most_KE / 7)
        assert 0.8 - 1e-3 < float(ratio.min()) <= float(ratio.max()) < 1.0 + 1e-3
        shrunk += int((ratio < 0.99).sum())
    assert shrunk > 0


@pytest.mark.parametrize("name", BASES)
def test_value_scales_are_absent_at_16_bits_and_that_is_noted(name: str) -> None:
    method, bits, learned = fit(name, "llada_gqa", "bits=w4a4")
    model = fresh("llada_gqa")
    blocks = range(len(model.trunk().blocks))
    assert all("v.scale" not in learned.get(block_part(index)) for index in blocks)
    assert [note["where"] for note in learned.notes if "bits.attention.v = 16" in note["what"]] == ["all blocks"]
    method.apply(model, learned, bits)
    cores = [model.block_sites(block).attention.core for block in model.trunk().blocks]
    assert all(getattr(core, "v_scale_KE", None) is None for core in cores)
    _, _, off = fit(name, "llada_gqa", "bits=w4a4", *only("cgq"))
    assert not [note for note in off.notes if "IA-AQ" in note["what"]]


def test_plus_with_full_precision_weights_keeps_the_value_scales() -> None:
    method, bits, learned = fit("dllmquant_plus", "llada_gqa", "bits=w4a4", "bits.weights.bits=16", KV[1])
    assert set(learned.get("block_000")) == {"v.scale"}
    model = fresh("llada_gqa")
    method.apply(model, learned, bits)
    assert bool(torch.isfinite(logits(model, trajectory(fresh("llada_gqa")))).all())


@pytest.mark.parametrize("name", BASES)
def test_quantized_inputs_reach_later_blocks_through_the_value_scales(name: str) -> None:
    method, bits = method_named(name, *KV)
    model = fresh("llada_gqa")
    fed = dataclasses.replace(states_of(model), inputs="quantized")
    first, second = method.fit(model, bits, fed), method.fit(model, bits, states_of(model))
    assert not torch.equal(first.get("block_001")["v.scale"], second.get("block_001")["v.scale"])
    assert torch.equal(first.get("block_000")["v.scale"], second.get("block_000")["v.scale"])
