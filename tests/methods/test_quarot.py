"""QuaRot against explicit matrices: the stream is rotated, outliers fall, every switch keeps the function.

Shape suffixes: N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from starquant.config.methods import METHODS
from starquant.errors import ConfigError
from starquant.methods.fitted import ENDS
from starquant.models.base import MaskedDiffusionModel
from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.models.roles import Role, Site
from starquant.numerics import sqnr_db
from starquant.quantized import ActivationQuantizer, HadamardTransform
from starquant.store.manifest import ManifestEntry
from tests.support.methods import method_named
from tests.support.models import ARCHITECTURES, fresh, logits
from tests.support.specs import spec
from tests.support.states import states_of

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 150, 15, 16]])
#: Order -> order of its Paley core; the rest is a power of two. Feed-forward sizes of the golden models (in small,
#: 12288 = 12 x 1024 and 18944 = 148 x 128), their widths and head widths.
CORES = {4: 1, 384: 12, 296: 148, 224: 28, 128: 1, 32: 1, 16: 1, 96: 12, 160: 20}


def hadamard(n: int) -> Tensor:
    """The normalised Hadamard matrix of order n: a Paley core, entry by entry, doubled until it is large enough."""
    core = CORES[n]
    matrix = torch.ones(1, 1, dtype=torch.float64) if core == 1 else paley(core)
    while len(matrix) < n:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return matrix / n**0.5


def paley(order: int) -> Tensor:
    """Paley's first construction where order - 1 is a prime, else the second."""
    first = order in (12, 20)
    q = order - 1 if first else order // 2 - 1
    residues = {x * x % q for x in range(1, q)}
    legendre = [0 if a == 0 else (1 if a in residues else -1) for a in range(q)]
    rows = [[0] + [1] * q] + [[-1 if first else 1] + [legendre[(i - j) % q] for j in range(q)] for i in range(q)]
    conference, eye = torch.tensor(rows, dtype=torch.float64), torch.eye(q + 1, dtype=torch.float64)
    if first:
        return conference + eye
    both = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, both) + torch.kron(eye, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double())


def apply(
    model: MaskedDiffusionModel, *overrides: str, bits: str = "w16a16"
) -> tuple[dict[str, Tensor], list[ManifestEntry]]:
    """Put quarot_rtn on a model; returns the rotation's tensors and the manifest."""
    method, asked = method_named("quarot_rtn", f"bits={bits}", *overrides)
    learned = method.fit(model, asked)
    return learned.get(ENDS), method.apply(model, learned, asked)


def matrix_of(ends: dict[str, Tensor], width: int) -> Tensor:
    """R, explicitly."""
    if "rotation.matrix" in ends:
        return ends["rotation.matrix"]
    assert set(ends["rotation.signs"].tolist()) == {-1.0, 1.0}
    return ends["rotation.signs"][:, None] * hadamard(width)


def hidden_states(model: MaskedDiffusionModel) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(IDS, output_hidden_states=True).hidden_states


def given(model: MaskedDiffusionModel, site: Site, block: int = 0) -> Tensor:
    """What a site gives to its linears on the fixed ids."""
    found: list[Tensor] = []
    module = model.block_sites(model.trunk().blocks[block]).inputs[site]
    handle = module.register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return found[0].double()


@pytest.mark.parametrize(
    ("architecture", "kind"), [*((name, "hadamard") for name in ARCHITECTURES), ("llada_gqa", "orthogonal")]
)
def test_the_residual_stream_is_the_original_times_r(architecture: str, kind: str) -> None:
    model, old = fresh(architecture), fresh(architecture)
    before = hidden_states(old)
    ends, _ = apply(model, f"method.residual_rotation={kind}")
    r_DD = matrix_of(ends, before[0].shape[-1])
    torch.testing.assert_close(r_DD @ r_DD.T, torch.eye(len(r_DD), dtype=torch.float64))
    after = hidden_states(model)
    for h, rotated in zip(before[:-1], after[:-1], strict=True):
        wanted = h.double() @ r_DD
        assert float((rotated - wanted).norm() / wanted.norm()) < 1e-4
        assert float((rotated - h).norm() / h.norm()) > 0.5
    for index, block in enumerate(model.trunk().blocks):
        for site, norm in model.block_sites(block).norms.items():
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))
            read = given(old, site, index) / old.block_sites(old.trunk().blocks[index]).norms[site].weight.detach()
            torch.testing.assert_close(given(model, site, index), read @ r_DD, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_seeds_change_the_rotation_and_nothing_else(kind: str) -> None:
    models = [fresh("llada_gqa") for _ in range(3)]
    settings = [(f"method.residual_rotation={kind}", f"method.rotation_seed={seed}") for seed in (0, 0, 1)]
    ends = [next(iter(apply(model, *own)[0].values())) for model, own in zip(models, settings, strict=True)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    torch.testing.assert_close(logits(models[0], IDS), logits(models[2], IDS), rtol=1e-3, atol=1e-4)


def peak(x: Tensor) -> float:
    """Largest magnitude over the root mean square, averaged over tokens."""
    return float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())


def kurtosis(x: Tensor) -> float:
    """Fourth moment over the squared second; 3 for a Gaussian."""
    return float((x.pow(4).mean(-1) / x.square().mean(-1).square()).mean())


def with_outlier(architecture: str) -> MaskedDiffusionModel:
    """A model whose stream has one channel some thirty times as large as the others."""
    model = fresh(architecture)
    with torch.no_grad():
        model.trunk().embedding.weight[:, 7] = 30.0 * model.trunk().embedding.weight.std()
    return model


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("architecture", ["llada_mha", "dream_gqa"])
def test_an_outlier_channel_is_spread_over_all(architecture: str, kind: str) -> None:
    model = with_outlier(architecture)
    before, _, after = given(model, Site.QKV), apply(model, f"method.residual_rotation={kind}"), given(model, Site.QKV)
    assert peak(before) > 8.0
    assert peak(after) < 0.6 * peak(before)
    assert kurtosis(after) < 0.4 * kurtosis(before)
    exact, losses = logits(with_outlier(architecture), IDS), {}
    for rotation in (kind, "none"):
        quantized = with_outlier(architecture)
        apply(quantized, f"method.residual_rotation={rotation}", bits="w4a4")
        losses[rotation] = sqnr_db(exact, logits(quantized, IDS))
    assert losses[kind] > losses["none"] + 1.0, losses


def test_none_leaves_stream_and_gains() -> None:
    model, before = fresh("dream_gqa"), fresh("dream_gqa")
    ends, _ = apply(model, "method.residual_rotation=none")
    assert ends == {}
    assert model.to_original_basis is None
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    changed = {name.split(".")[-2] for (name, ours), theirs in pairs if not torch.equal(ours, theirs)}
    assert changed == {"v_proj", "o_proj", "down_proj"}
    for h, same in zip(hidden_states(before), hidden_states(model), strict=True):
        torch.testing.assert_close(same, h, rtol=1e-3, atol=1e-4)


SWITCHES = {
    "residual_rotation": ("hadamard", "none"),
    "head_hadamard": ("true", "false"),
    "down_hadamard": ("true", "false"),
    "qk_hadamard": ("true", "false"),
}


@pytest.mark.parametrize(
    ("architecture", "only"),
    [*(("llada_gqa", only) for only in (*SWITCHES, "nothing", "everything")), ("dream_gqa", "everything")],
)
def test_every_switch_alone_keeps_the_function(architecture: str, only: str) -> None:
    """At 16 bits; and each one does change weights, transforms or the attention."""
    settings = [f"method.{key}={values[only not in (key, 'everything')]}" for key, values in SWITCHES.items()]
    model = fresh(architecture)
    apply(model, *settings)
    exact = logits(fresh(architecture), IDS)
    torch.testing.assert_close(logits(model, IDS), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
    sites, old = (m.block_sites(m.trunk().blocks[1]) for m in (model, fresh(architecture)))
    changed = {role for role in Role if not torch.equal(sites.linears[role].weight, old.linears[role].weight)}
    wanted = {
        "residual_rotation": set(Role),
        "head_hadamard": {Role.V, Role.OUT},
        "down_hadamard": {Role.DOWN},
        "everything": set(Role),
    }
    assert changed == wanted.get(only, set())
    assert (sites.inputs[Site.DOWN].transform is not None) == (only in ("down_hadamard", "everything"))
    assert (getattr(sites.attention.core, "qk_transform", None) is not None) == (only in ("qk_hadamard", "everything"))


@pytest.mark.parametrize("architecture", ["llada_mha", "dream_gqa"])
def test_heads_and_down_projections_are_rotated_by_explicit_matrices(architecture: str) -> None:
    """One Hadamard matrix a head on V, its inverse in the output projection; x H online in front of the down's W H."""
    model, old = fresh(architecture), fresh(architecture)
    apply(model, "method.residual_rotation=none")
    sites, before = (m.block_sites(m.trunk().blocks[0]) for m in (model, old))
    attention = sites.attention
    h_EE, width = hadamard(attention.head_dim), sites.linears[Role.DOWN].in_features
    values, outputs = (torch.block_diag(*[h_EE] * n) for n in (attention.n_kv_heads, attention.n_heads))
    if attention.n_heads == 4:  # 14 heads have no Hadamard matrix
        outputs = outputs @ torch.kron(hadamard(4), torch.eye(attention.head_dim, dtype=torch.float64))
    pairs = {
        Role.V: values.T @ before.linears[Role.V].weight.double(),
        Role.OUT: before.linears[Role.OUT].weight.double() @ outputs,
        Role.DOWN: before.linears[Role.DOWN].weight.double() @ hadamard(width),
    }
    for role, wanted in pairs.items():
        torch.testing.assert_close(sites.linears[role].weight.double(), wanted, rtol=1e-5, atol=1e-6)
    if before.linears[Role.V].bias is not None:
        wanted = before.linears[Role.V].bias.double() @ values
        torch.testing.assert_close(sites.linears[Role.V].bias.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given(model, Site.DOWN), given(old, Site.DOWN) @ hadamard(width), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(given(model, Site.OUT), given(old, Site.OUT) @ outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("architecture", "width", "bits"), [("llada_mha", 384, "w4a4"), ("dream_gqa", 296, "w16a16")])
def test_the_online_transform_is_in_the_manifest(architecture: str, width: int, bits: str) -> None:
    model, off = fresh(architecture), fresh(architecture)
    _, entries = apply(model, bits=bits)
    shown = {entry.role: entry.transform for entry in entries if entry.kind == "linear"}
    across = "hadamard across 4 heads" if architecture == "llada_mha" else None
    expected = {"down_proj": f"hadamard {width}", "out_proj": across}
    assert shown == {role.value: None for role in Role} | expected
    for block in model.trunk().blocks:
        for site, module in model.block_sites(block).inputs.items():
            assert isinstance(module, ActivationQuantizer) == (bits == "w4a4")
            assert isinstance(module.transform, HadamardTransform) == (site is Site.DOWN)
            assert (module.transform is not None) == (site is Site.DOWN or (site is Site.OUT and across is not None))
    _, entries = apply(off, "method.down_hadamard=false", "method.out_hadamard=false", bits=bits)
    assert all(entry.transform is None for entry in entries)


@pytest.mark.parametrize(
    ("setting", "ratio"),
    [("bits.grid=authors", 0.9), ("bits.grid=common", 1.0), ("bits.activations.clip_ratio=0.8", 0.8)],
)
def test_the_clip_ratio_of_its_grid_reaches_every_input(setting: str, ratio: float) -> None:
    model = fresh("llada_gqa")
    apply(model, setting, bits="w4a4")
    found = [m.format for m in model.modules() if isinstance(m, ActivationQuantizer)]
    assert [fmt.clip_ratio for fmt in found] == [ratio] * 4 * len(model.trunk().blocks)


def test_the_clip_ratio_reaches_the_quantized_inputs_of_the_walk() -> None:
    """Otherwise GPTQ would be solved for other inputs than it meets."""
    parts = []
    for clip in ("1.0", "0.5"):
        method, bits = method_named("quarot", "bits=w4a4", f"bits.activations.clip_ratio={clip}")
        model = fresh("llada_gqa")
        states = states_of(model)
        fed = type(states)(states.batches, states.mask_id, states.bins, inputs="quantized")
        parts.append(method.fit(model, bits, fed).get("block_001"))
    assert any(not torch.equal(parts[0][key], parts[1][key]) for key in parts[0])


def llada(width: int, heads: int, feed_forward: int, **settings: object) -> MaskedDiffusionModel:
    sizes = {"d_model": width, "n_heads": heads, "n_layers": 1, "mlp_hidden_size": feed_forward, "vocab_size": 40}
    return LLaDAModelLM(LLaDAConfig(**sizes, mask_token_id=39, eos_token_id=38, **settings)).eval()


def tied_dream() -> MaskedDiffusionModel:
    config = DreamConfig(40, 32, 64, 1, 4, mask_token_id=39, eos_token_id=38, pad_token_id=38, tie_word_embeddings=True)
    model = DreamModel(config).eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


TIED = "method.residual_rotation: got 'hadamard', but the head is tied"


@pytest.mark.parametrize(
    ("make", "message", "instead"),
    [
        (lambda: llada(52, 13, 64), "method.residual_rotation: got hadamard, but", "residual_rotation=orthogonal"),
        (lambda: llada(80, 8, 64), "method.head_hadamard: got true, but", "head_hadamard=false"),
        (lambda: llada(64, 4, 90), "method.down_hadamard: got true, but", "down_hadamard=false"),
        (lambda: llada(64, 4, 64, weight_tying=True), TIED, "residual_rotation=none"),
        (tied_dream, TIED, "residual_rotation=none"),
    ],
)
def test_what_cannot_be_rotated_is_one_error_and_what_it_allows_works(
    make: Callable[[], MaskedDiffusionModel], message: str, instead: str
) -> None:
    """No Hadamard matrix of order 52, 10 or 90 is known; nothing has changed when that is told."""
    model, ids = make(), torch.tensor([[1, 2, 3, 39, 39]])
    exact, before = logits(model, ids), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        apply(model)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1
    assert instead.partition("=")[2] in str(caught.value).partition("allowed: ")[2]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    apply(model, f"method.{instead}")
    torch.testing.assert_close(logits(model, ids), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", ["0", "1.5", "-1"])
def test_clip_ratios_out_of_range_are_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^method\.authors\.activation_clip: got"):
        spec("method=quarot", f"method.authors.activation_clip={value}")


def test_heads_without_a_hadamard_matrix_are_noted() -> None:
    method, bits = method_named("quarot_rtn")
    assert method.fit(fresh("llada_mha"), bits).notes == []
    (note,) = method.fit(fresh("dream_gqa"), bits).notes
    assert note["what"] == "no Hadamard matrix across 14 heads: out_hadamard without effect"


@pytest.mark.parametrize("name", ["quarot", "quarot_rtn", "star_quant", "star_quant_plus", "dllmquant_plus_plus"])
def test_queries_and_keys_are_rotated_where_one_of_them_is_rounded(name: str) -> None:
    """As QuaRot's official code does; a record says which it was."""
    for settings, wanted in (((), False), (("bits.attention.k=4",), True), (("bits.attention.q=8",), True)):
        run = spec(f"method={name}", "bits=w4a4", *settings).canonical()
        assert run.method.model_dump()["qk_hadamard"] is wanted
    off = spec(f"method={name}", "bits=w4a4", "bits.attention.k=4", "method.qk_hadamard=false").canonical()
    assert off.method.model_dump()["qk_hadamard"] is False


def test_what_is_not_decided_is_refused_and_not_off() -> None:
    """From Python, where no run has decided it."""
    run = spec("method=quarot", "bits=w4a4", "bits.attention.k=4")
    undecided, model = METHODS.build(run.method), fresh("llada_gqa")
    with pytest.raises(ConfigError, match=r"^method.qk_hadamard: got auto with .* below 16 bits; allowed: "):
        undecided.fit(model, run.bits, states_of(model))
    METHODS.build(run.method.at_bits(run.bits)).validate(model, run.bits)
