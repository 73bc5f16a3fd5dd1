"""FlatQuant and FreeAct against slow arithmetic written from the recipe, and the identities that they rest on."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from starquant.calibration.batches import CalibrationStates
from starquant.calibration.walk import BlockVisit, walk
from starquant.config.bits import BitsSpec
from starquant.config.methods.flatquant import FlatQuantOptions
from starquant.errors import ConfigError, DataError
from starquant.methods.fitted import Fitted
from starquant.methods.flatquant import method as flatquant
from starquant.methods.flatquant.folding import clip_block, rewrite_block, tensors_of
from starquant.methods.flatquant.parameters import BlockParameters, Invertible
from starquant.methods.flatquant.simulated import simulated_block
from starquant.methods.flatquant.training import mean_over_tokens, train
from starquant.methods.freeact import sum_of_states
from starquant.methods.solvers import solver_of
from starquant.models.layers import site_input
from starquant.models.roles import Role, Site
from starquant.numerics import BIDIRECTIONAL, fermat_sizes
from starquant.quantized import InvertibleKronecker, SiteTransform, StateGate
from starquant.quantized.install import quantize_block
from tests.support.methods import FOUR, fitted_once, method_named
from tests.support.models import ARCHITECTURES, fresh
from tests.support.specs import spec
from tests.support.states import states_of

ALL = (*FOUR, "bits.attention.q=4")


def visit_of(architecture: str) -> BlockVisit:
    """The first block, observed."""
    model = fresh(architecture)
    visit = next(iter(walk(model, states_of(model))))
    visit.observe()
    return visit


def learned_of(visit: BlockVisit, bits: BitsSpec, **options: object) -> BlockParameters:
    """Parameters moved off their start, each another way."""
    absmax = {site: torch.rand(visit.sites.width(site)) + 0.5 for site in visit.sites.inputs}
    learned = BlockParameters(visit.sites, absmax, bits, FlatQuantOptions(name="flatquant", **options), seed=3)
    generator = torch.Generator().manual_seed(7)
    clips = {id(parameter) for parameter in learned.clips()}
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_((1.0 if id(parameter) in clips else 0.1) * torch.randn(parameter.shape, generator=generator))
    learned.renew()
    return learned


@pytest.mark.parametrize(
    ("width", "sizes"),
    [
        *[(4096, (64, 64)), (12288, (96, 128)), (3584, (56, 64)), (18944, (128, 148)), (576, (24, 24))],
        *[(1536, (32, 48)), (12, (2, 6)), (15, (3, 5)), (1, (1, 1)), (7, (1, 7)), (10, (2, 5))],
    ],
)
def test_sizes_are_the_papers(width: int, sizes: tuple[int, int]) -> None:
    assert fermat_sizes(width) == sizes
    if width % 4 != 2:  # which has no two factors of one parity
        pairs = [(m, width // m) for m in range(1, math.isqrt(width) + 1) if width % m == 0]
        assert sizes == max(pair for pair in pairs if sum(pair) % 2 == 0)


def test_the_start_is_what_torchs_cayley_parametrization_makes_of_a_random_orthogonal_matrix() -> None:
    """The published code hands such a matrix to torch as the free parameter; s = 1 leaves P orthogonal."""
    module = Invertible(6, torch.Generator().manual_seed(0))
    expected = []
    for free in (module.u_EE, module.v_EE):
        linear = nn.Linear(6, 6, bias=False)
        linear.weight.data = free.detach().clone()
        nn.utils.parametrizations.orthogonal(linear, orthogonal_map="cayley", use_trivialization=False)
        expected.append(linear.weight)
    pair = module.pair()
    torch.testing.assert_close(pair.matrix, expected[0] @ expected[1].T, rtol=0, atol=1e-5)
    torch.testing.assert_close(pair.matrix, pair.dual, rtol=0, atol=1e-6)
    torch.testing.assert_close(module.u_EE @ module.u_EE.T, torch.eye(6), rtol=0, atol=1e-5)


def test_pairs_undo_each_other_off_the_start() -> None:
    module = Invertible(8, torch.Generator().manual_seed(1))
    with torch.no_grad():
        module.s_E.copy_(torch.linspace(0.4, 2.5, 8))
    matrix, dual = module.pair(torch.float64)
    torch.testing.assert_close(matrix.T @ dual, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not torch.allclose(matrix, dual, atol=0.1)
    torch.testing.assert_close(torch.linalg.svdvals(matrix).sort().values, module.s_E.double().sort().values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_with_all_transforms_folded_is_the_same_function(architecture: str) -> None:
    """Far off the start: Kronecker pairs, channel scales, values, queries and keys; no rounding, no clips."""
    visit, (_, bits) = visit_of(architecture), method_named("flatquant", *ALL)
    tensors = tensors_of(learned_of(visit, bits), visit.sites)
    assert {"keys.matrix", "values.matrix", "down_input.channel", "qkv_input.factor_1"} <= tensors.keys()
    rewrite_block(visit.sites, tensors)
    for example in visit.examples(4):
        got = visit.block(example.hidden_BLD, example.context)[example.visible_BL]
        exact = example.output_BLD[example.visible_BL]
        assert float((got - exact).norm() / exact.norm()) < 1e-5
    sites = visit.sites
    assert [str(sites.inputs[site].transform) for site in (Site.QKV, Site.OUT)] == [
        "invertible {} x {}".format(*fermat_sizes(sites.width(Site.QKV))),
        f"invertible {sites.attention.n_heads} x identity",
    ]


def rounded(x: Tensor, ratio_high: Tensor | float = 1.0, ratio_low: Tensor | float = 1.0, qmax: int = 7) -> Tensor:
    """Round rows to a symmetric grid, one number at a time; each end has its clip ratio."""
    out = torch.empty_like(x)
    for i, row in enumerate(x.tolist()):
        high, low = max(0.0, *row) * float(ratio_high), min(0.0, *row) * float(ratio_low)
        scale = max(high, -low) / qmax
        out[i] = torch.tensor([scale * min(max(round(v / scale), -qmax - 1), qmax) for v in row])
    return out


def test_one_layer_by_the_recipe() -> None:
    """Down projection and values of a random layer: weights, cut weights, codes, inputs, loss; plain matrices."""
    visit, (_, bits) = visit_of("dream_gqa"), method_named("flatquant", *FOUR)
    learned = learned_of(visit, bits)
    tensors = {name: tensor.double() for name, tensor in tensors_of(learned, visit.sites).items()}
    original = {role: linear.weight.detach().double() for role, linear in visit.sites.linears.items()}
    bias_O = visit.sites.linears[Role.V].bias.detach().double()

    p_DD = torch.kron(tensors["down_input.factor_0"], tensors["down_input.factor_1"])
    channel_D = tensors["down_input.channel"]
    w_OD = original[Role.DOWN] / channel_D @ torch.linalg.inv(p_DD).T
    ratio = learned.row_clips[Role.DOWN].detach().sigmoid().double()
    for o in range(len(w_OD)):
        w_OD[o] = w_OD[o].clamp(w_OD[o].min() * ratio[o, 1], w_OD[o].max() * ratio[o, 0])
    down_OD = rounded(w_OD)

    p_II = torch.kron(tensors["qkv_input.factor_0"], tensors["qkv_input.factor_1"])
    v_OI = original[Role.V] / tensors["qkv_input.channel"] @ torch.linalg.inv(p_II).T
    ratio = learned.row_clips[Role.V].detach().sigmoid().double()
    for o in range(len(v_OI)):
        v_OI[o] = v_OI[o].clamp(v_OI[o].min() * ratio[o, 1], v_OI[o].max() * ratio[o, 0])
    heads = torch.block_diag(*[tensors["values.matrix"]] * visit.sites.attention.n_kv_heads)
    value_OI, value_O = rounded(heads.T @ v_OI), bias_O @ heads

    simulated = simulated_block(visit, learned, bits, {})
    caught: dict[str, Tensor] = {}
    down = visit.model.block_sites(simulated).inputs[Site.DOWN]
    down.register_forward_hook(lambda _, inputs, out: caught.update(x=site_input(inputs), y=out))
    example = next(iter(visit.examples(2)))
    with torch.no_grad():
        output_BLD = simulated(example.hidden_BLD, example.context)
    clip_E = learned.sites[Site.DOWN].clip_E
    assert clip_E is not None
    ratio_high, ratio_low = clip_E.detach().sigmoid()
    assert abs(float(ratio_high - ratio_low)) > 1e-3
    x_ND = (caught["x"].double() * channel_D @ p_DD).flatten(0, 1)
    expected = rounded(x_ND, ratio_high, ratio_low).float()
    torch.testing.assert_close(caught["y"].flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    error_BL = (output_BLD - example.output_BLD).square().mean(-1)
    squares = [
        float(e) ** 2
        for i, j in example.visible_BL.nonzero().tolist()
        for e in output_BLD[i, j] - example.output_BLD[i, j]
    ]
    assert float(mean_over_tokens(error_BL, example)) == pytest.approx(sum(squares) / len(squares), rel=1e-4)

    stored = {name: tensor.float() for name, tensor in tensors.items()}
    rewrite_block(visit.sites, stored)
    clip_block(visit.sites, stored, bits)
    solve = solver_of(stored, bits, FlatQuantOptions(name="flatquant").weights)
    quantize_block(visit.model, visit.block, visit.index, bits, solve)
    sites = visit.sites
    torch.testing.assert_close(sites.linears[Role.DOWN].weight.double(), down_OD, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sites.linears[Role.V].weight.double(), value_OI, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sites.linears[Role.V].bias.double(), value_O, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        installed_BLD = visit.block(example.hidden_BLD, example.context)
    # the trained block is the installed one, but for a code on the edge of two
    apart = (installed_BLD - output_BLD).norm() / output_BLD.norm()
    assert float(apart) < 0.02 < float((output_BLD - example.output_BLD).norm() / example.output_BLD.norm())


def test_cutting_twice_is_cutting_once() -> None:
    visit, (_, bits) = visit_of("llada_gqa"), method_named("flatquant", *FOUR)
    tensors = tensors_of(learned_of(visit, bits, clip_start=0.8), visit.sites)
    rewrite_block(visit.sites, tensors)
    before = {role: linear.weight.clone() for role, linear in visit.sites.linears.items()}
    clip_block(visit.sites, tensors, bits)
    once = {role: linear.weight.clone() for role, linear in visit.sites.linears.items()}
    clip_block(visit.sites, tensors, bits)
    for role, linear in visit.sites.linears.items():
        assert not torch.equal(once[role], before[role])
        torch.testing.assert_close(linear.weight, once[role], rtol=0, atol=1e-6)


def test_training_lowers_the_error_of_the_blocks_output() -> None:
    visit, (method, bits) = visit_of("llada_mha"), method_named("flatquant", *ALL, "method.epochs=12")
    absmax = {site: torch.ones(visit.sites.width(site)) for site in visit.sites.inputs}
    learned = BlockParameters(visit.sites, absmax, bits, method.options, 0)
    before = copy.deepcopy(learned.state_dict())
    first, last = train(visit, learned, bits, method.options, {})
    assert last < 0.8 * first
    unchanged = [name for name, tensor in learned.state_dict().items() if torch.equal(tensor, before[name])]
    assert unchanged == []
    assert all(parameter.grad is None for parameter in visit.block.parameters())


def test_channels_start_where_the_recipe_says() -> None:
    visit, (method, bits) = visit_of("llada_mha"), method_named("flatquant", *FOUR)
    absmax_D = torch.rand(visit.sites.width(Site.GATE_UP)) + 0.1
    absmax_D[3] = 0.0
    learned = BlockParameters(visit.sites, {Site.GATE_UP: absmax_D}, bits, method.options, 0)
    weights = [visit.sites.linears[role].weight.abs().amax(0) for role in (Role.GATE, Role.UP)]
    expected_D = torch.maximum(*weights) ** 0.7 / absmax_D.clamp_min(1e-5) ** 0.3
    torch.testing.assert_close(learned.sites[Site.GATE_UP].channel_D.data, expected_D.detach())
    assert learned.sites[Site.OUT].channel_D is None
    clip = learned.sites[Site.OUT].clip_E
    assert clip is not None and clip.tolist() == pytest.approx([4.0, 4.0], abs=1e-3)


def test_only_what_is_rounded_is_learned() -> None:
    visit = visit_of("llada_mha")
    for words, rows, inputs, keys in (
        (("bits=w4a16",), True, False, False),
        (("bits=w16a16", "bits.activations.bits=4"), False, True, False),
        (("bits=w16a16", "bits.attention.k=4"), False, False, True),
    ):
        method, bits = method_named("flatquant", *words)
        learned = BlockParameters(visit.sites, {}, bits, method.options, 0)
        assert bool(learned.row_clips) == rows
        assert all((part.clip_E is not None) == inputs for part in learned.sites.values())
        assert (learned.keys is not None) == (learned.operand_clip_OE is not None) == keys


def test_freeact_gates_both_states_and_sums_their_errors() -> None:
    model, learned = fresh("llada_gqa"), fitted_once("freeact", "llada_gqa")
    method, bits = method_named("freeact", *FOUR)
    method.apply(model, learned, bits)
    sites = [model.block_sites(block) for block in model.trunk().blocks]
    assert isinstance(sites[0].inputs[Site.QKV].transform, InvertibleKronecker)
    for of_block, site in ((sites[0], Site.OUT), (sites[1], Site.QKV), (sites[1], Site.DOWN)):
        placed, width = of_block.inputs[site].transform, of_block.width(site)
        assert isinstance(placed, SiteTransform) and isinstance(placed.gate, StateGate)
        assert (placed.gate.d_m, placed.gate.d_u) == (round(width / 32), round(width / 32))
    example = next(iter(visit_of("llada_gqa").examples(4)))
    error_BL = torch.rand(example.visible_BL.shape)
    expected = 0.0
    for state in BIDIRECTIONAL:
        here = [
            float(error_BL[i, j])
            for i, j in example.visible_BL.nonzero().tolist()
            if int(example.context.state_BL[i, j]) == BIDIRECTIONAL.index(state)
        ]
        expected += sum(here) / len(here)
    assert float(sum_of_states(error_BL, example)) == pytest.approx(expected, rel=1e-5)


def test_channels_that_a_state_does_not_use_get_no_gradient_from_it() -> None:
    """Gates act while everything is learned."""
    method, bits = method_named("freeact", *FOUR)
    visit = visit_of("llada_gqa")
    gates = method.gates(visit.sites, 1, bits)
    learned = learned_of(visit, bits)
    block = simulated_block(visit, learned, bits, gates)
    caught: dict[str, Tensor] = {}
    site = visit.model.block_sites(block).inputs[Site.DOWN]
    site.register_forward_hook(lambda _, inputs, out: caught.update(y=out))
    example = next(iter(visit.examples(4)))
    with torch.no_grad():
        block(example.hidden_BLD, example.context)
    width = caught["y"].shape[-1]
    d = round(width / 32)
    masked_BL = example.context.masked_BL
    assert float(caught["y"][masked_BL][:, width - d :].abs().max()) == 0.0
    assert float(caught["y"][~masked_BL][:, width - 2 * d : width - d].abs().max()) == 0.0
    assert float(caught["y"][masked_BL][:, width - 2 * d : width - d].abs().max()) > 0.0


@pytest.mark.parametrize(
    ("name", "inputs", "more"),
    [("flatquant", "full_precision", ()), ("freeact", "quantized", ("method.weights.name=gptq",))],
)
def test_an_interrupted_fit_goes_on(
    name: str, inputs: str, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, bits = method_named(name, *FOUR, *more)
    model = fresh("dream_gqa")
    made = states_of(model)
    states = CalibrationStates(made.batches, made.mask_id, made.bins, inputs=inputs)
    whole = method.fit(model, bits, states)
    trained: list[int] = []
    real = flatquant.train

    def cut(visit: BlockVisit, *rest: object) -> tuple[float, float]:
        if len(trained) == 1 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        trained.append(visit.index)
        return real(visit, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(flatquant, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        method.fit(fresh("dream_gqa"), bits, states, Fitted.resume(tmp_path))
    again = method.fit(fresh("dream_gqa"), bits, states, Fitted.resume(tmp_path))
    assert trained == list(range(len(model.trunk().blocks)))
    for part in whole.parts():
        ours, theirs = again.get(part), whole.get(part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (0.0, r"blocks\.0: what is learned is not finite; lower method.learning_rate or method.clip_learning_rate$"),
        (1e-5, r"blocks\.0 qkv_input.factor_0: got a matrix of condition number 1e\+05, allowed: 10000; lower method"),
    ],
)
def test_what_diverges_is_named(scale: float, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ruined(visit: BlockVisit, learned: BlockParameters, *_: object) -> tuple[float, float]:
        with torch.no_grad():
            learned.sites[Site.QKV].left.s_E[0] = scale
        return 1.0, 1.0

    monkeypatch.setattr(flatquant, "train", ruined)
    method, bits = method_named("flatquant", *FOUR)
    model = fresh("llada_mha")
    with pytest.raises(DataError, match=message):
        method.fit(model, bits, states_of(model))


def test_a_loss_that_is_no_number_is_named() -> None:
    visit, (method, bits) = visit_of("llada_mha"), method_named("flatquant", *FOUR)
    learned = learned_of(visit, bits)
    with torch.no_grad():
        learned.values.s_E.fill_(torch.nan)
    with pytest.raises(DataError, match=r"blocks\.0: what is learned is not finite; lower method.learning_rate or"):
        train(visit, learned, bits, method.options, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("method.clip_start=1.0", r"^method.clip_start: got 1.0, allowed: less than or equal to 0.9999$"),
        ("method.epochs=0", r"^method.epochs: got 0, allowed: greater than or equal to 1$"),
        ("method.batch=0", r"^method.batch: got 0, allowed: greater than or equal to 1$"),
        ("method.learning_rate=0.0", r"^method.learning_rate: got 0.0, allowed: greater than 0$"),
        ("method.diagonal_alpha=1.5", r"^method.diagonal_alpha: got 1.5, allowed: less than or equal to 1$"),
        ("+method.masked=0.1", r"^method.masked: unknown key"),
    ],
)
def test_bad_options_are_named(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec("method=flatquant", words)
    with pytest.raises(ConfigError, match=r"^method.masked: got 0.6, allowed: less than or equal to 0.45$"):
        spec("method=freeact", "method.masked=0.6")
