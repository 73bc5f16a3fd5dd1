"""STaR-Quant as a whole: the transform that is learned, what reaches the quantizers, what is kept and reported.

Shape suffixes: N tokens, D width, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from starquant.config.methods.star_quant import TransformOptions
from starquant.methods.blockwise import BlockwiseMethod
from starquant.methods.fitted import ENDS, Fitted, block_part
from starquant.methods.star_quant import method as star_quant
from starquant.methods.star_quant import site_transforms
from starquant.methods.star_quant.base_transform import Group, Transform, output_errors
from starquant.methods.star_quant.learned_transform import learn
from starquant.models.base import MaskedDiffusionModel
from starquant.models.layers import site_input
from starquant.models.roles import Site
from starquant.numerics import PerChannel, PerToken, QuantFormat, fake_quantize, mse_clip, random_rotation
from tests.support.methods import by_hand, method_named
from tests.support.models import fresh, logits
from tests.support.states import states_of

QUICK = ("method.transform.steps=5", "method.transform.rows=16", "method.weights.mse_clip=false")
FOUR = ("bits=w4a4", "bits.attention.v=4", "bits.attention.k=4")
UNGATED = ("method.sgat.enabled=false", "method.tac.enabled=false")
FIXED = ("method.transform.fit=fixed", "method.transform.state_clip=false")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [11, 12, 13, 150, 15, 16, 17, 18]])


def states_ids(model: MaskedDiffusionModel) -> Tensor:
    return IDS.where(IDS % 3 > 0, model.mask_token_id)


def rewritten(name: str, *overrides: str, architecture: str = "llada_gqa", times: int = 1) -> tuple[Tensor, Tensor]:
    """Logits before and after everything but quantizers is put in place by hand, `compensate` so many times."""
    method, bits = method_named(name, *overrides)
    assert isinstance(method, BlockwiseMethod)
    model = fresh(architecture)
    learned, before = method.fit(model, bits, states_of(model)), logits(model, states_ids(model))
    by_hand(method, model, learned, times)
    return before, logits(model, states_ids(model))


@pytest.mark.parametrize("fit", ["learned", "closed_form", "fixed"])
@pytest.mark.parametrize("structure", ["dense", "kronecker", "shared"])
def test_without_gates_and_compensation_nothing_but_rounding_changes(structure: str, fit: str) -> None:
    settings = (f"method.transform.fit={fit}", f"method.transform.structure={structure}")
    before, after = rewritten("star_quant", *FOUR, *QUICK, *UNGATED, *settings)
    assert float((after - before).norm() / before.norm()) < 1e-4
    if structure == "dense":
        zero = [f"method.sgat.{s}.{site.value}=0" for s in ("masked", "unmasked") for site in Site]
        before, after = rewritten("star_quant", *FOUR, *QUICK, "method.tac.enabled=false", *zero, *settings)
        assert float((after - before).norm() / before.norm()) < 1e-4


@pytest.mark.parametrize("architecture", ["llada_gqa", "dream_gqa"])
def test_with_everything_switched_off_it_is_quarot_bit_for_bit(architecture: str) -> None:
    found = []
    for name, settings in (("star_quant", (*FIXED, *UNGATED)), ("quarot_rtn", ("method.weights.mse_clip=true",))):
        method, bits = method_named(name, *FOUR, "bits.grid=common", *settings)
        model = fresh(architecture)
        method.apply(model, method.fit(model, bits, states_of(model)), bits)
        found.append(logits(model, states_ids(model)))
    assert torch.equal(*found)


def outlier_group(gate: tuple[int, int] = (0, 0)) -> tuple[Group, Group]:
    """Rows whose last channels are outliers, other ones in either state; to learn from, and to be judged on."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(n, 32, generator=generator) for n in (24, 8)]
    spread = torch.ones(2, 32)
    spread[0, 28:], spread[1, 24:28] = 15.0, 15.0
    masked, other = (torch.randn(2, 64, 32, generator=generator) * spread[i] for i in (0, 1))
    fmt = QuantFormat(4, True, PerChannel()), QuantFormat(4, True, PerToken())
    first, second = (Group(weights, (masked[i], other[i]), *fmt, gate, True) for i in (0, 1))
    return first, second


def slow_errors(group: Group, p_DD: Tensor, clip: Sequence[float]) -> tuple[float, ...]:
    """The objective token by token; weights rounded by the numerics, activations here."""
    weight = torch.cat(list(group.weights)) @ p_DD
    ratios = mse_clip(weight, group.weight_format, grid=20, max_shrink=0.5)
    weight = fake_quantize(weight, group.weight_format, clip=ratios)
    errors, (d_m, d_u), width = [], group.gate, len(p_DD)
    for state, rows_ND in enumerate(group.rows_SND):
        lost = size = 0.0
        for x_D in rows_ND:
            y = x_D @ p_DD
            dropped = range(width - d_u, width) if state == 0 else range(width - d_u - d_m, width - d_u)
            for channel in dropped:
                y[channel] = 0.0
            step = float(y.abs().max()) * clip[state] / 7
            y = (y / step).round().clamp(-8, 7) * step
            target = x_D @ torch.cat(list(group.weights)).T
            lost, size = lost + float((y @ weight.T - target).square().sum()), size + float(target.square().sum())
        errors.append(lost / size)
    return tuple(errors)


@pytest.mark.parametrize("gate", [(0, 0), (2, 5)])
def test_errors_are_those_of_a_token_by_token_computation(gate: tuple[int, int]) -> None:
    group, _ = outlier_group(gate)
    p_DD = torch.linalg.qr(torch.randn(32, 32))[0]
    found = output_errors(group, Transform([p_DD]), torch.tensor([0.9, 0.7]))
    assert found == pytest.approx(slow_errors(group, p_DD, (0.9, 0.7)), rel=1e-3)
    full = QuantFormat(16, True, PerToken())
    exact = replace(group, gate=(0, 0), weight_format=full, activation_format=full)
    assert max(output_errors(exact, Transform([p_DD]), None)) < 1e-10


@pytest.mark.parametrize("sizes", [(32,), (4, 8)])
@pytest.mark.parametrize("state_clip", [True, False])
def test_learning_lowers_the_real_error_of_rows_it_has_not_seen(sizes: tuple[int, ...], state_clip: bool) -> None:
    """In both states; P stays orthogonal. `output_errors` rounds, nothing is straight-through."""
    trained, unseen = outlier_group()
    start = [torch.eye(n, dtype=torch.float64) for n in sizes]
    before = output_errors(unseen, Transform(start).to(unseen.weights[0]), None)
    learned = learn(trained, Transform(start), TransformOptions(steps=60, learning_rate=0.03, state_clip=state_clip))
    after = output_errors(unseen, learned.transform, learned.state_clip)
    assert all(new < 0.6 * old for new, old in zip(after, before, strict=True)), (before, after)
    assert [len(factor) for factor in learned.transform.factors] == list(sizes)
    assert (learned.state_clip is not None) == state_clip
    for factor in learned.transform.factors:
        assert factor.dtype == torch.float32
        assert float((factor @ factor.T - torch.eye(len(factor))).abs().max()) < 1e-5


def test_clip_ratios_are_learned_per_state_where_p_is_not() -> None:
    """Only masked tokens have a spike, in a channel that no weight reads: only their range shrinks."""
    group, _ = outlier_group()
    masked, other = torch.randn(64, 32), torch.randn(64, 32).sign() * (1 + 0.01 * torch.rand(64, 32))
    masked[:, 0] = 12.0
    weights = [weight.clone() for weight in group.weights]
    for weight in weights:
        weight[:, 0] = 0.0
    group = replace(group, weights=weights, rows_SND=(masked, other))
    start = [torch.eye(32, dtype=torch.float64)]
    learned = learn(group, Transform(start), TransformOptions(steps=80, learning_rate=0.1), rotate=False)
    assert torch.equal(learned.transform.factors[0], torch.eye(32))
    assert learned.state_clip is not None
    assert learned.state_clip[0] < 0.8 < 0.9 < learned.state_clip[1]


@pytest.mark.parametrize(("structure", "width", "wanted"), [
    ("auto", 64, "dense"), ("auto", 65, "kronecker"), ("shared", 64, "dense"), ("shared", 65, "kronecker"),
    ("dense", 65, "dense"), ("kronecker", 64, "kronecker"),
])  # fmt: skip
def test_structures_of_sites_with_a_matrix_of_their_own(structure: Any, width: int, wanted: str) -> None:
    assert TransformOptions(structure=structure, dense_width=64).structure_of(width) == wanted


@pytest.mark.parametrize("structure", ["auto", "shared"])
@pytest.mark.parametrize("fit", ["learned", "closed_form", "fixed"])
def test_matrices_are_where_the_structure_says(structure: str, fit: str) -> None:
    """Fixed has none; shared none behind a norm, neither learned nor online, but another residual rotation."""
    settings = (f"method.transform.structure={structure}", f"method.transform.fit={fit}")
    method, bits = method_named("star_quant", *FOUR, *QUICK, *UNGATED, *settings)
    model = fresh("llada_gqa")
    learned = method.fit(model, bits, states_of(model))
    method.apply(model, learned, bits)
    for index, block in enumerate(model.trunk().blocks):
        tensors, sites = learned.get(block_part(index)), model.block_sites(block)
        own = {Site(key.partition(".")[0]) for key in tensors if ".factor_" in key}
        free = set(sites.norms) if structure == "shared" else set()
        assert own == (set() if fit == "fixed" else set(Site) - free)
        assert all(sites.inputs[site].transform is None for site in free)
        for key in (k for k in tensors if ".factor_" in k):
            torch.testing.assert_close(tensors[key] @ tensors[key].T, torch.eye(len(tensors[key])), rtol=0, atol=1e-5)
    residual = learned.get(ENDS)
    assert ("rotation.matrix" in residual) == (structure == "shared" and fit != "fixed")
    if "rotation.matrix" in residual:
        matrix = residual["rotation.matrix"]
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(96, dtype=matrix.dtype), rtol=0, atol=1e-5)
        start = random_rotation("hadamard", 96, 0).apply(torch.eye(96, dtype=matrix.dtype))
        distance = float((matrix - start).norm())  # without gates the closed form has nothing to turn
        assert distance < 1e-6 if fit == "closed_form" else distance > 1e-3


KEYS = {"block", "site", "width", "d_m", "d_u", "why", "structure"} | {
    f"{name}_{state}" for name in ("clip", "start_error", "training_error", "error") for state in ("masked", "unmasked")
}


def test_the_report_has_a_full_row_a_site_judged_on_rows_not_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, judged = [], []
    exact_learn, exact_errors = site_transforms.learn, site_transforms.output_errors
    monkeypatch.setattr(site_transforms, "learn", lambda g, *a, **k: (trained.append(g), exact_learn(g, *a, **k))[1])
    monkeypatch.setattr(site_transforms, "output_errors", lambda g, *a: (judged.append(g), exact_errors(g, *a))[1])
    method, bits = method_named("star_quant", *FOUR, *QUICK)
    model = fresh("llada_gqa")
    report = method.fit(model, bits, states_of(model)).report
    assert [(row["block"], row["site"]) for row in report] == [(b, site.value) for b in (0, 1) for site in Site]
    assert all(row.keys() == KEYS for row in report)
    assert len(trained) == len(report)
    assert len(judged) == 3 * len(report)
    for i, group in enumerate(trained):
        assert judged[3 * i] is group, "the error on the rows that P was learned on"
        for before_or_after in judged[3 * i + 1 : 3 * i + 3]:
            ours, theirs = group.rows_SND[1], before_or_after.rows_SND[1]
            assert len(ours) == len(theirs) == 16
            if i:  # equal tokens have equal embeddings; masked ones are all equal in a sequence without others
                assert float((ours[:, None] - theirs[None]).norm(dim=-1).min()) > 1e-3


@pytest.mark.parametrize("inputs", ["full_precision", "quantized"])
@pytest.mark.parametrize("extra", ["method.transform.structure=shared", "method.weights.name=gptq"])
def test_an_interrupted_fit_goes_on_to_the_same_tensors_and_report(
    inputs: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the third site of the second block; saved and loaded, nothing is lost either."""
    method, bits = method_named("star_quant", *FOUR, *QUICK, "method.tac.condition=state", extra)
    model = fresh("llada_gqa")
    states = replace(states_of(model), inputs=inputs)
    whole, exact = method.fit(model, bits, states), star_quant.fit_site

    def killed(visit: Any, site: Site, *rest: Any) -> dict[str, Tensor]:
        if (visit.index, site) == (1, Site.GATE_UP):
            raise KeyboardInterrupt
        return exact(visit, site, *rest)

    monkeypatch.setattr(star_quant, "fit_site", killed)
    with pytest.raises(KeyboardInterrupt):
        method.fit(model, bits, states, Fitted.resume(tmp_path / "fit"))
    monkeypatch.setattr(star_quant, "fit_site", exact)
    again = method.fit(model, bits, states, Fitted.resume(tmp_path / "fit"))
    again.save(tmp_path / "saved")
    for found in (again, Fitted.load(tmp_path / "saved")):
        assert (found.report, found.notes, found.parts()) == (whole.report, whole.notes, whole.parts())
        for part in whole.parts():
            ours, theirs = found.get(part), whole.get(part)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("settings", [(), ("method.tac.placement=value",), ("method.transform.fit=fixed",)])
def test_compensating_twice_is_compensating_once(settings: tuple[str, ...]) -> None:
    once, twice = (rewritten("star_quant", "bits=w4a4", *QUICK, *settings, times=times)[1] for times in (1, 2))
    assert torch.equal(once, twice)


@pytest.mark.parametrize("fit", ["learned", "fixed"])
def test_what_a_site_gives_is_corrected_transformed_gated_and_clipped_by_state(fit: str) -> None:
    """Token by token from the tensors alone: z M^T + d, then P, then the gate, then the grid of the token's state."""
    method, bits = method_named(
        "star_quant", "bits=w4a4", *QUICK, "method.tac.condition=state", f"method.transform.fit={fit}",
        "method.out_hadamard=false", "method.down_hadamard=false",
    )  # fmt: skip
    model = fresh("llada_gqa")
    learned = method.fit(model, bits, states_of(model))
    fed = Fitted()
    for part in learned.parts():
        changed = learned.get(part)
        for i, key in enumerate(key for key in changed if key.endswith("state_clip")):
            changed[key] = torch.tensor([0.9 - 0.1 * i, 0.55 + 0.1 * i])
        fed.put(part, changed)
    method.apply(model, fed, bits)
    tensors, ids = fed.get(block_part(1)), states_ids(model)
    for site, module in model.block_sites(model.trunk().blocks[1]).inputs.items():
        seen: list[tuple[Tensor, Tensor]] = []
        handle = module.register_forward_hook(lambda _, args, out, seen=seen: seen.append((site_input(args), out)))
        logits(model, ids)
        handle.remove()
        expect_site(tensors, site, *seen[0], ids == model.mask_token_id)


def expect_site(tensors: dict[str, Tensor], site: Site, x_BLD: Tensor, out_BLD: Tensor, masked_BL: Tensor) -> None:
    d_m, d_u = tensors[f"{site.value}.gate"].tolist()
    for x, got, masked in zip(x_BLD.flatten(0, 1), out_BLD.flatten(0, 1), masked_BL.flatten().tolist(), strict=True):
        y, state = x.double(), 0 if masked else 1
        if site is Site.OUT:
            blocks = zip(tensors["tac.matrix"][state].double(), tensors["tac.shift"][state].double(), strict=True)
            y = torch.cat([m @ y[16 * n : 16 * n + 16] + d for n, (m, d) in enumerate(blocks)])
        if f"{site.value}.factor_0" in tensors:
            y = y @ tensors[f"{site.value}.factor_0"].double()
        y[slice(len(y) - d_u, None) if masked else slice(len(y) - d_u - d_m, len(y) - d_u)] = 0.0
        step = y.abs().max() * tensors[f"{site.value}.state_clip"][state] / 7
        wanted = (y / step).round().clamp(-8, 7) * step
        assert float(((got - wanted).abs() > 1e-3 * step).double().mean()) < 0.03  # but for ties


def test_applying_to_two_fresh_models_gives_the_same() -> None:
    method, bits = method_named("star_quant", *FOUR, *QUICK)
    models = [fresh("llada_gqa") for _ in range(2)]
    learned = method.fit(models[0], bits, states_of(models[0]))
    for model in models:
        method.apply(model, learned, bits)
    assert torch.equal(*(logits(model, states_ids(model)) for model in models))
