"""SGAT against the paper's diagonal gates, planted idle subspaces, and eigenvalues that no code under test computes.

Shape suffixes: N tokens, D width, O outputs. Channels are [shared | d_m masked | d_u unmasked].
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from starquant.config.methods.star_quant import SGATOptions, SiteShares, TACOptions, TransformOptions
from starquant.errors import ConfigError
from starquant.methods.fitted import block_part
from starquant.methods.star_quant.base_transform import Group, Transform, gated
from starquant.methods.star_quant.learned_transform import learn
from starquant.methods.star_quant.sgat import Gate, closed_form, closed_form_of_rows, gate_of
from starquant.methods.star_quant.site_transforms import compensate_sites
from starquant.models.base import MaskedDiffusionModel
from starquant.models.context import Context
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.models.roles import Site
from starquant.numerics import BIDIRECTIONAL, PerChannel, PerToken, QuantFormat, TokenState, random_orthogonal
from starquant.quantized import StateGate
from tests.support.methods import by_hand, method_named
from tests.support.models import fresh, logits
from tests.support.specs import spec
from tests.support.states import states_of

QUICK = ("bits=w4a4", "method.transform.steps=5", "method.transform.rows=16", "method.weights.mse_clip=false")
SITES = [site.value for site in Site]


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed: int, width: int) -> Tensor:
    """A second moment whose energies fall off over three decades."""
    q_DD = torch.linalg.qr(rows(seed, width, width))[0]
    return q_DD @ torch.diag(torch.logspace(-3, 0, width, dtype=torch.float64)) @ q_DD.T


def shares(masked: float, unmasked: float, only: str | None = None) -> list[str]:
    return [
        f"method.sgat.{state}.{site}={share if only in (None, site) else 0}"
        for state, share in (("masked", masked), ("unmasked", unmasked))
        for site in SITES
    ]


def test_gates_lie_where_the_weights_are() -> None:
    """Each pass would carry them over else."""
    model = fresh("llada_gqa").to("meta")
    sites = model.block_sites(model.trunk().blocks[0])
    tensors = {f"{Site.QKV.value}.gate": torch.tensor([3, 2])}
    compensate_sites(sites, tensors, spec("bits=w4a4").bits, TACOptions())
    gate = sites.inputs[Site.QKV].transform.gate
    assert (gate.d_m, gate.d_u, gate.keep_SD.device.type) == (3, 2, "meta")


@pytest.mark.parametrize(("share", "width", "wanted"), [(0.1, 96, 10), (0.1, 94, 9), (0.0, 96, 0), (1 / 32, 4096, 128)])
def test_shares_become_the_nearest_count_of_channels(share: float, width: int, wanted: int) -> None:
    options = SGATOptions(masked=SiteShares(down_input=share), unmasked=SiteShares(down_input=0.25))
    gate = gate_of(options, Site.DOWN, 0, width)
    assert gate.widths == (wanted, round(width / 4))
    assert gate_of(SGATOptions(masked=SiteShares(down_input=share)), Site.DOWN, 0, width).d_m == wanted


@pytest.mark.parametrize("site", list(Site))
@pytest.mark.parametrize("block", [0, 1])
def test_only_the_first_attention_input_has_no_gate_unless_asked(site: Site, block: int) -> None:
    first = block == 0 and site is Site.QKV
    gate = gate_of(SGATOptions(), site, block, 64)
    assert gate.acts != first
    assert ("first attention input" in gate.why) == first
    assert gate_of(SGATOptions(first_attention=True), site, block, 64).widths == (2, 2)
    off = gate_of(SGATOptions(enabled=False, first_attention=True), site, block, 64)
    assert (off.widths, off.acts, off.why) == ((0, 0), False, "off")


@pytest.mark.parametrize("value", ["0.46", "-0.1"])
def test_shares_that_would_leave_nothing_shared_are_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^method\.sgat\.masked\.out_input: got"):
        spec("method=star_quant", f"method.sgat.masked.out_input={value}")


@pytest.mark.parametrize("gate", [(3, 5), (0, 4), (4, 0), (0, 0), (7, 7)])
def test_the_closed_form_is_orthogonal_and_takes_the_least_energy(gate: tuple[int, int]) -> None:
    """U_u holds the d_u smallest eigenvalues of masked tokens, U_m the d_m smallest of the others in what is left."""
    (d_m, d_u), width = gate, 16
    masked, unmasked = moment(1, width), moment(2, width)
    p_DD = closed_form(masked.float(), unmasked.float(), gate)
    assert p_DD.dtype == torch.float64
    torch.testing.assert_close(p_DD.T @ p_DD, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-10)
    s = width - d_m - d_u
    u_m, u_u = p_DD[:, s : s + d_m], p_DD[:, s + d_m :]
    least = torch.linalg.eigvalsh(masked)[:d_u].sum()
    torch.testing.assert_close((u_u.T @ masked @ u_u).trace(), least, rtol=1e-3, atol=1e-7)
    outside = torch.eye(width, dtype=torch.float64) - u_u @ u_u.T
    left = outside @ unmasked @ outside + 1e3 * u_u @ u_u.T  # U_u may not be taken again
    wanted = torch.linalg.eigvalsh(left)[:d_m].sum()
    torch.testing.assert_close((u_m.T @ unmasked @ u_m).trace(), wanted, rtol=1e-3, atol=1e-7)


def lost(rows_ND: Tensor, p_DD: Tensor, closed: range) -> float:
    """Energy of rows in some channels of x P, summed one by one."""
    return sum(float((x @ p_DD[:, c]) ** 2) for x in rows_ND for c in closed)


def orthogonal(seed: int, width: int) -> Tensor:
    return torch.linalg.qr(rows(seed, width, width))[0].contiguous()


@pytest.mark.parametrize("gate", [(3, 6), (0, 3), (6, 0), (0, 0), (6, 9)])
def test_the_closed_form_of_rows_loses_least_of_all_kronecker_products(gate: tuple[int, int]) -> None:
    """Whatever the second factor; the first state is served first, as by the dense one."""
    (d_m, d_u), m, k, n = gate, 5, 3, 40
    masked, unmasked = (rows(seed, n, m * k) @ moment(seed + 2, m * k) for seed in (1, 2))
    a_MM = closed_form_of_rows(masked.view(n, m, k), unmasked.view(n, m, k), gate).contiguous()
    torch.testing.assert_close(a_MM.T @ a_MM, torch.eye(m, dtype=torch.float64), rtol=0, atol=1e-10)
    of_u, of_m = range(15 - d_u, 15), range(15 - d_u - d_m, 15 - d_u)
    free = m - d_u // k
    for seed in range(20):
        b_KK = orthogonal(seed, k)
        p_DD, other = torch.kron(a_MM, b_KK), torch.kron(orthogonal(seed + 50, m), b_KK)
        assert lost(masked, p_DD, of_u) <= lost(masked, other, of_u)
        turned = torch.cat((a_MM[:, :free] @ orthogonal(seed + 90, free), a_MM[:, free:]), 1)  # the same U_u
        assert lost(unmasked, p_DD, of_m) <= lost(unmasked, torch.kron(turned, b_KK), of_m) * (1 + 1e-9)


def test_gates_of_whole_runs_are_the_nearest() -> None:
    gate = Gate(112, 592, "asked")
    assert gate.in_runs(1) is gate
    assert gate.in_runs(16) is gate
    assert gate.in_runs(64) == Gate(128, 576, "asked: 112 and 592, in whole runs of 64")
    assert gate.in_runs(256).widths == (0, 512)


def test_the_shared_part_is_as_near_the_axes_as_its_span_allows() -> None:
    p_DD, width, s = closed_form(moment(1, 12), moment(2, 12), (2, 3)), 12, 7
    axes = torch.eye(width, dtype=torch.float64)[:, :s]
    distance = float((p_DD[:, :s] - axes).norm())
    for seed in range(200):
        turned = p_DD[:, :s] @ torch.matrix_exp(0.1 * (rows(seed, s, s) - rows(seed, s, s).T))
        assert float((turned - axes).norm()) >= distance
    idle = torch.ones(width, dtype=torch.float64)
    masked, unmasked = idle.clone(), idle.clone()
    masked[-3:], unmasked[-5:-3] = 0, 0
    p_DD = closed_form(torch.diag(masked), torch.diag(unmasked), (2, 3))
    torch.testing.assert_close(p_DD[:, :s], axes)  # what is idle lies at the end already


def planted(width: int, d_m: int, d_u: int) -> tuple[Tensor, Tensor]:
    """Rows of masked tokens without energy in d_u directions, of the others without in d_m; both planted at random."""
    frame = torch.linalg.qr(rows(3, width, width))[0]
    idle_masked, idle_unmasked = frame[:, :d_u], torch.linalg.qr(rows(4, width, width))[0][:, :d_m]
    masked = rows(5, 40, width)
    unmasked = rows(6, 40, width)
    return masked - masked @ idle_masked @ idle_masked.T, unmasked - unmasked @ idle_unmasked @ idle_unmasked.T


@pytest.mark.parametrize("gate", [(2, 3), (3, 1), (0, 3), (2, 0)])
def test_gates_on_planted_idle_directions_lose_nothing_with_one_static_weight(gate: tuple[int, int]) -> None:
    """Idle spaces of half the width leave d_m directions outside U_u whatever U_u is."""
    width, (d_m, d_u) = 24, gate
    masked, unmasked = planted(width, 12, 12)
    p_DD, weight_OD = closed_form(masked.T @ masked, unmasked.T @ unmasked, gate), rows(7, 10, width)
    one, zero = torch.ones, torch.zeros
    g_m = torch.diag(torch.cat((one(width - d_m - d_u), one(d_m), zero(d_u)))).double()  # the paper's G_m and G_u
    g_u = torch.diag(torch.cat((one(width - d_m - d_u), zero(d_m), one(d_u)))).double()
    folded = weight_OD @ p_DD
    for state, x_ND, g_DD in ((TokenState.MASKED, masked, g_m), (TokenState.UNMASKED, unmasked, g_u)):
        torch.testing.assert_close(x_ND @ p_DD @ g_DD @ folded.T, x_ND @ weight_OD.T)
        assert torch.equal(gated(x_ND @ p_DD, state, gate), x_ND @ p_DD @ g_DD)
        online = StateGate(width, *gate)(
            (x_ND @ p_DD)[None], Context((x_ND, x_ND), None, torch.full((1, 40), state is TokenState.MASKED))
        )
        assert torch.equal(online[0], x_ND @ p_DD @ g_DD)
    if d_u:  # and the other state's gate would lose something
        assert float((unmasked @ p_DD @ g_m @ folded.T - unmasked @ weight_OD.T).norm()) > 1.0


def one_block(idle: int) -> MaskedDiffusionModel:
    """One block; no ordinary token has energy in the last `idle` channels of the embedding, [MASK] only in one."""
    torch.manual_seed(2)
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 1, "mlp_hidden_size": 96, "vocab_size": 60, "init_std": 0.2}
    model = LLaDAModelLM(LLaDAConfig(**sizes, mask_token_id=59, eos_token_id=58, pad_token_id=58)).eval()
    with torch.no_grad():
        table = model.trunk().embedding.weight
        table[:, 64 - idle :] = 0.0
        table[59, 63] = 1.0
    return model


def what_gates_change(*settings: str, model: MaskedDiffusionModel) -> tuple[StateGate, float]:
    """The gate in front of the first attention, and what everything but rounding changes of the logits, relatively."""
    method, bits = method_named(
        "star_quant", *QUICK, *settings, "method.sgat.first_attention=true", "method.tac.enabled=false"
    )
    learned = method.fit(model, bits, states_of(model))
    ids = torch.randint(0, 58, (3, 16), generator=torch.Generator().manual_seed(1))
    ids[0, 3:9] = ids[1] = ids[2, ::2] = 59
    before = logits(model, ids)
    by_hand(method, model, learned)
    gate = model.block_sites(model.trunk().blocks[0]).inputs[Site.QKV].transform.gate  # type: ignore[union-attr]
    return gate, float((logits(model, ids) - before).norm() / before.norm())


@pytest.mark.parametrize(("idle", "exact"), [(20, True), (0, False)])
def test_a_model_gated_where_nothing_flows_is_the_model(idle: int, exact: bool) -> None:
    settings = (*shares(0.1, 0.15, "qkv_input"), "method.transform.fit=closed_form")
    gate, error = what_gates_change(*settings, model=one_block(idle))
    assert (gate.d_m, gate.d_u) == (6, 10)
    assert error < 1e-4 if exact else error > 1e-2


@pytest.mark.parametrize("fit", ["closed_form", "fixed"])
def test_a_kronecker_closed_form_finds_idle_runs_of_channels(fit: str) -> None:
    """Ordinary tokens have no energy in two runs of eight channels, [MASK] none in two others."""
    settings = (
        *shares(0.25, 0.25, "qkv_input"),
        "method.transform.structure=kronecker",
        "method.residual_rotation=none",
    )
    model = one_block(0)
    with torch.no_grad():
        table = model.trunk().embedding.weight
        table[59] = 0.2 * torch.randn(64)
        table[:59, 8:24] = table[59, 24:40] = 0.0
    gate, error = what_gates_change(*settings, f"method.transform.fit={fit}", model=model)
    assert (gate.d_m, gate.d_u) == (16, 16)
    assert error < 1e-4 if fit == "closed_form" else error > 1e-2


def test_every_site_has_the_gate_it_was_asked_for() -> None:
    """Unequal d_m and d_u, other ones at every site; none in front of the first attention."""
    asked = {"qkv_input": (0.1, 0.2), "out_input": (0.0, 0.1), "gate_up_input": (0.25, 0.0), "down_input": (0.05, 0.3)}
    states = ("masked", "unmasked")
    settings = [f"method.sgat.{s}.{site}={pair[k]}" for site, pair in asked.items() for k, s in enumerate(states)]
    method, bits = method_named("star_quant", *QUICK, *settings)
    model = fresh("llada_gqa")
    learned = method.fit(model, bits, states_of(model))
    method.apply(model, learned, bits)
    for index, block in enumerate(model.trunk().blocks):
        for site, module in model.block_sites(block).inputs.items():
            width = 160 if site is Site.DOWN else 96
            wanted = tuple(round(share * width) for share in asked[site.value])
            if index == 0 and site is Site.QKV:
                assert f"{site.value}.gate" not in learned.get(block_part(index))
                assert getattr(module.transform, "gate", None) is None
                continue
            assert tuple(learned.get(block_part(index))[f"{site.value}.gate"].tolist()) == wanted
            assert (module.transform.gate.d_m, module.transform.gate.d_u) == wanted
            (row,) = (r for r in learned.report if (r["block"], r["site"]) == (index, site.value))
            assert (row["d_m"], row["d_u"], row["why"]) == (*wanted, "asked")


def test_gates_that_hurt_are_dropped_and_the_report_says_why() -> None:
    """No direction of a random model is idle; the numbers are those of the same fit with gates kept."""
    reports = {}
    for keep in ("always", "if_better"):
        method, bits = method_named("star_quant", *QUICK, f"method.sgat.keep={keep}", *shares(0.2, 0.2))
        model = fresh("llada_gqa")
        learned = method.fit(model, bits, states_of(model))
        reports[keep] = learned.report
        gates = [key for index in (0, 1) for key in learned.get(block_part(index)) if key.endswith(".gate")]
        assert len(gates) == (7 if keep == "always" else 0)
    for with_gate, row in zip(reports["always"], reports["if_better"], strict=True):
        if with_gate["d_m"] == 0:
            assert row == with_gate
            continue
        assert (row["d_m"], row["d_u"]) == (0, 0)
        found = re.fullmatch(r"not better: error (\S+) with, (\S+) without", row["why"])
        assert found
        sums = [r["error_masked"] + r["error_unmasked"] for r in (with_gate, row)]
        assert [float(text) for text in found.groups()] == pytest.approx(sums, rel=6e-3)
        assert sums[1] < sums[0]


def test_gates_that_help_are_kept() -> None:
    """The last channels of [MASK] are outliers that no weight reads: without them the grid is fifty times finer."""
    method, bits = method_named(
        "star_quant",
        *QUICK,
        *shares(0.0, 0.05, "qkv_input"),
        "method.transform.fit=fixed",
        "method.residual_rotation=none",
        "method.sgat.first_attention=true",
        "method.sgat.keep=if_better",
        "method.tac.enabled=false",
    )
    model = one_block(3)
    with torch.no_grad():
        model.trunk().embedding.weight[59, 61:] = 10.0
        for linear in model.block_sites(model.trunk().blocks[0]).readers(Site.QKV).values():
            linear.weight[:, 61:] = 0.0
    learned = method.fit(model, bits, states_of(model))
    (row,) = (r for r in learned.report if r["site"] == "qkv_input")
    assert (row["d_m"], row["d_u"], row["why"]) == (0, 3, "asked")
    assert row["error_masked"] < 0.1 * row["start_error_masked"]
    assert learned.get(block_part(0))["qkv_input.gate"].tolist() == [0, 3]


def test_the_gate_takes_part_in_learning() -> None:
    """P learned with the gate loses less by it than P learned without."""
    four = (QuantFormat(4, True, PerChannel()), QuantFormat(4, True, PerToken()))
    masked, unmasked = planted(16, 4, 4)
    weights, found = [rows(8, 12, 16).float()], {}
    options = TransformOptions(steps=60, learning_rate=0.03)
    for gate in ((4, 4), (0, 0)):
        group = Group(weights, (masked.float(), unmasked.float()), *four, gate, False)
        p: Transform = learn(
            group, Transform([random_orthogonal(16, torch.Generator().manual_seed(1))]), options
        ).transform
        rows_of = zip(BIDIRECTIONAL, group.rows_SND, strict=True)
        lost = [x - gated(p(x), state, (4, 4)) @ p.factors[0].T for state, x in rows_of]
        found[gate] = sum(float((x @ weights[0].T).square().sum()) for x in lost)
    assert found[4, 4] < 0.5 * found[0, 0], found


def test_gates_act_without_clips_compensation_and_learning_too() -> None:
    fixed = ("method.transform.fit=fixed", "method.transform.state_clip=false", "method.tac.enabled=false")
    method, bits = method_named("star_quant", *QUICK, *fixed)
    model = fresh("llada_gqa")
    learned = method.fit(model, bits, states_of(model))
    entries = method.apply(model, learned, bits)
    assert any("gates 3 masked, 3 unmasked" in (entry.transform or "") for entry in entries)
