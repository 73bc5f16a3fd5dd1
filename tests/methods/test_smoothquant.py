"""SmoothQuant against its formula on naively captured inputs, channel by channel.

Shape suffixes: N tokens, D width of a site, O outputs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starquant.methods.fitted import block_part
from starquant.methods.smoothquant import SmoothQuant
from starquant.models.roles import BlockSites, Site
from tests.support.formulas import rounded, sharing
from tests.support.methods import DEAD, FIRST_BLOCK, dead_channel_fit, method_named
from tests.support.models import ARCHITECTURES, fresh, logits
from tests.support.specs import spec
from tests.support.states import inputs_of, site_inputs, states_of

ALL_SITES = "method.sites=[qkv_input,out_input,gate_up_input,down_input]"


def formula(sites: BlockSites, site: Site, x_ND: Tensor, alpha: float) -> Tensor:
    """max|X|^alpha / max|W|^(1 - alpha), one channel at a time."""
    weights = torch.cat([linear.weight.detach().double() for linear in sites.readers(site).values()])
    most_x, most_w = ([max(map(abs, column)) for column in rows.T.tolist()] for rows in (x_ND, weights))
    scale = []
    for channel in range(x_ND.shape[1]):
        shared = sharing(sites, site, channel)
        scale.append(max(most_x[c] for c in shared) ** alpha / max(most_w[c] for c in shared) ** (1 - alpha))
    return torch.tensor(scale, dtype=torch.float64)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scales_are_the_formula(architecture: str, alpha: float) -> None:
    method, bits = method_named("smoothquant", ALL_SITES, f"method.alpha={alpha}")
    model = fresh(architecture)
    learned = method.fit(model, bits, states_of(model))
    assert learned.notes == []
    inputs = inputs_of(model, states_of(model))
    for index, block in enumerate(model.trunk().blocks):
        sites, found = model.block_sites(block), learned.get(block_part(index))
        assert set(found) == {f"{site.value}.scale" for site in Site}
        for site in Site:
            wanted = formula(sites, site, site_inputs(model, inputs, index, site), alpha)
            torch.testing.assert_close(found[f"{site.value}.scale"].double(), wanted, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_alpha_flatten_weights_or_activations(alpha: float) -> None:
    """At 0 every input channel's largest weight becomes 1, at 1 every channel's largest activation."""
    method, bits = method_named("smoothquant", f"method.alpha={alpha}")
    model = fresh("llada_mha")
    states = states_of(model)
    method.apply(model, method.fit(model, bits, states), spec("bits=w16a16").bits)
    inputs = inputs_of(model, states)
    for index, block in enumerate(model.trunk().blocks):
        for site in (Site.QKV, Site.GATE_UP):
            weights = [w.weight for w in model.block_sites(block).readers(site).values()]
            most_w = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
            most = site_inputs(model, inputs, index, site).abs().amax(0) if alpha else most_w
            torch.testing.assert_close(most.float(), torch.ones(len(most)), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("grid", ["authors", "common"])
def test_only_the_listed_sites_are_smoothed_and_what_is_installed_is_rounded(grid: str) -> None:
    method, bits = method_named("smoothquant", "bits=w4a16", f"bits.grid={grid}")
    symmetric = grid == "common"
    model, before = fresh("llada_mha"), fresh("llada_mha")
    learned = method.fit(model, bits, states_of(model))
    method.apply(model, learned, bits)
    for index, (block, old) in enumerate(zip(model.trunk().blocks, before.trunk().blocks, strict=True)):
        found, old_sites = learned.get(block_part(index)), before.block_sites(old)
        assert set(found) == {"qkv_input.scale", "gate_up_input.scale"}
        for role, linear in model.block_sites(block).linears.items():
            scale = found.get(f"{role.site.value}.scale", torch.ones(1))
            wanted = rounded(old_sites.linears[role].weight.double() * scale, symmetric=symmetric)
            # A number half-way between two grid points may fall to either side in float32.
            step = wanted.abs().amax(1, keepdim=True) / 7
            off = (linear.weight - wanted).abs() > 1e-4 * step
            assert off.double().mean() < 1e-3
        for site, norm in model.block_sites(block).norms.items():
            wanted = old_sites.norms[site].weight / found[f"{site.value}.scale"]
            torch.testing.assert_close(norm.weight.double(), wanted.double())


@pytest.mark.parametrize("grid", ["authors", "common"])
@pytest.mark.parametrize("bits_name", ["w4a4", "w4a16"])
def test_search_takes_the_best_alpha_of_the_grid(bits_name: str, grid: str) -> None:
    """By an objective written out anew, on all rows; so it is never worse than 0.5."""
    method, bits = method_named(
        "smoothquant", f"bits={bits_name}", f"bits.grid={grid}", ALL_SITES, "method.search=true"
    )
    symmetric = grid == "common"
    every = method.options.model_copy(update={"search_rows": 10_000})
    model = fresh("llada_gqa")
    learned = SmoothQuant(every).fit(model, bits, states_of(model))
    inputs = inputs_of(model, states_of(model))
    chosen = {note["where"]: note["alpha"] for note in learned.notes if note["what"] == "alpha found"}
    assert len(set(chosen.values())) > 1
    for index, block in enumerate(model.trunk().blocks):
        sites = model.block_sites(block)
        for site in Site:
            x_ND = site_inputs(model, inputs, index, site)
            errors = {}
            for alpha in (step / 20 for step in range(21)):
                scale_D = formula(sites, site, x_ND, alpha)
                read_ND = (
                    x_ND / scale_D if bits.activations.bits == 16 else rounded(x_ND / scale_D, symmetric=symmetric)
                )
                weights = [linear.weight.detach().double() for linear in sites.readers(site).values()]
                lost = [read_ND @ rounded(w * scale_D, symmetric=symmetric).T - x_ND @ w.T for w in weights]
                errors[alpha] = sum(float(e.square().sum()) for e in lost)
            alpha = chosen[f"{model.block_name(index)} {site.value}"]
            assert errors[alpha] <= min(errors.values()) * (1 + 1e-3)
            assert errors[alpha] <= errors[0.5] * (1 + 1e-3)
            found = learned.get(block_part(index))[f"{site.value}.scale"].double()
            torch.testing.assert_close(found, formula(sites, site, x_ND, alpha), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("search", ["true", "false"])
def test_a_dead_channel_is_left_alone_and_noted(search: str) -> None:
    dead_channel_fit("smoothquant", f"method.search={search}")


def test_a_dead_value_channel_is_dead_in_every_head_that_reads_it() -> None:
    model = fresh("llada_gqa")
    sites = model.block_sites(model.trunk().blocks[FIRST_BLOCK])
    with torch.no_grad():
        next(linear for role, linear in sites.linears.items() if role.value == "v_proj").weight[DEAD] = 0.0
    method, bits = method_named("smoothquant", ALL_SITES)
    learned = method.fit(model, bits, states_of(model))
    scale_D = learned.get(block_part(FIRST_BLOCK))["out_input.scale"]
    shared = sharing(sites, Site.OUT, DEAD)
    assert len(shared) == 3
    assert bool((scale_D[shared] == 1.0).all())
    assert [(note["where"], note["count"]) for note in learned.notes] == [
        (f"{model.block_name(FIRST_BLOCK)} out_input", len(shared))
    ]
    method.apply(model, learned, bits)
    assert bool(torch.isfinite(logits(model, torch.tensor([[1, 2, 3, 199]]))).all())
