"""A family that is not like LLaDA, defined here alone: two experts, block-causal attention. The whole path carries it.

Shape suffixes: B batch, L sequence length, D model width, N tokens that an expert is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from starquant.calibration.batches import CalibrationStates, Segment
from starquant.calibration.masked_states import make_states
from starquant.calibration.site_statistics import Collect
from starquant.calibration.walk import walk
from starquant.config.bits import BitsSpec
from starquant.config.methods import METHODS
from starquant.config.speed import SpeedSpec
from starquant.diffusion import (
    BatchSize,
    LikelihoodEstimator,
    LLaDANoise,
    LLaDASampler,
    MaskPredictor,
    ScoreRequest,
    generate,
    generate_approximately,
    generate_many,
)
from starquant.errors import CheckpointError
from starquant.methods.base import Method
from starquant.methods.rare_experts import RARE
from starquant.models import FAMILIES, Family, family_of, load_model, register
from starquant.models.base import MaskedDiffusionModel, Trunk
from starquant.models.context import Context
from starquant.models.layers import InputSite, RMSNorm, Rotary, RotaryAttention
from starquant.models.roles import BlockSites, ExpertRole, ExpertSite, LinearKey, Role, Site
from starquant.numerics import dequantize
from starquant.packed.description import use_integers
from starquant.packed.export import export
from tests.support.methods import method_named
from tests.support.records import make_record
from tests.support.specs import spec

EXPERTS, BLOCK = 2, 4
MASK, EOS = 62, 63


class ToyConfig(PreTrainedConfig):
    model_type = "toy_moe"

    def __init__(self, width: int = 64, hidden: int = 48, layers: int = 2, words: int = 64, **kwargs: object) -> None:
        self.hidden_size, self.intermediate_size, self.num_hidden_layers = width, hidden, layers
        self.vocab_size, self.mask_token_id, self.context_length = words, MASK, 64
        super().__init__(**{"eos_token_id": EOS, "tie_word_embeddings": False} | kwargs)


class ToyExpert(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate, self.up = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down, self.down_input = nn.Linear(f, d, bias=False), InputSite()

    def forward(self, h_1ND: Tensor, context: Context) -> Tensor:
        return self.down(self.down_input(F.silu(self.gate(h_1ND)) * self.up(h_1ND), context))


class ToyBlock(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.attn_norm, self.ff_norm = RMSNorm(d, 1e-5), RMSNorm(d, 1e-5)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.attention = RotaryAttention(4, 4, d // 4)
        self.qkv_input, self.out_input, self.gate_up_input = InputSite(), InputSite(), InputSite()
        self.router = nn.Linear(d, EXPERTS, bias=False)
        self.experts = nn.ModuleList(ToyExpert(config) for _ in range(EXPERTS))

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        h = self.qkv_input(self.attn_norm(x_BLD), context)
        z_BLD = self.attention(self.q(h), self.k(h), self.v(h), context)
        x_BLD = x_BLD + self.out(self.out_input(z_BLD, context))
        n_BLD = self.ff_norm(x_BLD)
        weight_BL, chosen_BL = self.router(n_BLD).softmax(-1).max(-1)
        h, y_BLD = self.gate_up_input(n_BLD, context), torch.zeros_like(x_BLD)
        for index, expert in enumerate(self.experts):
            rows_N, columns_N = (chosen_BL == index).nonzero(as_tuple=True)
            part = context.routed(rows_N * x_BLD.shape[1] + columns_N)
            y_BLD[rows_N, columns_N] = expert(h[rows_N[None], columns_N[None]], part)[0]
        return x_BLD + weight_BL[..., None] * y_BLD


class ToyModel(MaskedDiffusionModel):
    config_class = ToyConfig
    base_model_prefix = ""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(ToyBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, 1e-5)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config.hidden_size // 4, 10000.0)
        self.post_init()

    def trunk(self) -> Trunk:
        return Trunk(self.embedding, self.blocks, self.norm, self.head, self.rotary)

    def linear_count(self) -> int:
        return self.config.num_hidden_layers * (4 + 3 * EXPERTS)

    def attention_mask(self, positions_BL: Tensor, visible_BL: Tensor | None) -> Tensor:
        """A token sees its own block and all before it; on padding at least itself."""
        block_BL = positions_BL // BLOCK
        sees_BLL = block_BL[:, None, :] <= block_BL[:, :, None]
        if visible_BL is not None:
            sees_BLL = sees_BLL & visible_BL[:, None] | torch.eye(positions_BL.shape[1], dtype=torch.bool)
        return sees_BLL[:, None]

    def block_sites(self, block: ToyBlock) -> BlockSites:
        linears: dict[LinearKey, nn.Linear] = {Role.Q: block.q, Role.K: block.k, Role.V: block.v, Role.OUT: block.out}
        inputs = {Site.QKV: block.qkv_input, Site.OUT: block.out_input, Site.GATE_UP: block.gate_up_input}
        for index, expert in enumerate(block.experts):
            linears |= {ExpertRole(Role.GATE, index): expert.gate, ExpertRole(Role.UP, index): expert.up}
            linears |= {ExpertRole(Role.DOWN, index): expert.down}
            inputs |= {ExpertSite(Site.DOWN, index): expert.down_input}
        norms, routers = {Site.QKV: block.attn_norm, Site.GATE_UP: block.ff_norm}, {Site.GATE_UP: block.router}
        return BlockSites(linears, inputs, block.attention, norms, routers, dict(enumerate(block.experts)))


TOY = Family(name="toy", config=ToyConfig, model=ToyModel, noise=LLaDANoise(), sampler=LLaDASampler)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that a family needs beside its folder."""
    monkeypatch.setattr(FAMILIES, "_targets", dict(FAMILIES))
    FAMILIES.add("toy", f"{__name__}:TOY")
    register(TOY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = ToyModel(ToyConfig(initializer_range=0.15))
    path = tmp_path_factory.mktemp("toy")
    model.save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path) -> MaskedDiffusionModel:
    return load_model(folder)


def words(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, MASK, shape, generator=torch.Generator().manual_seed(seed))


def half_masked(rows: int = 4, length: int = 16) -> Tensor:
    ids = words(rows, length)
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = MASK
    return ids


def states(model: MaskedDiffusionModel, *overrides: str) -> CalibrationStates:
    segments = [Segment(tuple(words(8 + 2 * i, seed=i).tolist()), 0, "") for i in range(8)]
    calibration = spec("calibration=testbed", *overrides).calibration
    return make_states(segments, calibration, model, LLaDASampler(4, 4, 4))


OWN = "calibration.experts.least_tokens=0"  # whatever few tokens an expert has


def w4a4() -> BitsSpec:
    return spec("bits=w4a4").bits


@torch.no_grad()
def logits(model: MaskedDiffusionModel, ids: Tensor, visible: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=visible).logits


def test_a_checkpoint_loads_as_what_was_saved(folder: Path, model: MaskedDiffusionModel) -> None:
    assert family_of(model) is TOY
    assert torch.equal(logits(AutoModel.from_pretrained(folder), half_masked()), logits(model, half_masked()))
    on_disk = load_model(folder, blocks_on_disk=True)
    torch.testing.assert_close(logits(on_disk, half_masked()), logits(model, half_masked()), rtol=0, atol=0)
    assert len(model.linears()) == 2 * (4 + 3 * EXPERTS)


def test_a_wrong_checkpoint_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden": 32, "intermediate_size": 32}))
    with pytest.raises(CheckpointError, match=r"misshapen: blocks\.0\.experts\.0\.(down|gate|up)\.weight"):
        load_model(tmp_path)


def test_a_block_sees_itself_and_those_before_it(model: MaskedDiffusionModel) -> None:
    ids, other = half_masked(), half_masked()
    other[:, 8:] = words(4, 8, seed=9)
    assert torch.equal(logits(model, ids)[:, :8], logits(model, other)[:, :8])
    assert not torch.equal(logits(model, ids)[:, 8:], logits(model, other)[:, 8:])
    one_late = ids.clone()
    one_late[:, 7] = (one_late[:, 7] + 1) % MASK
    assert not torch.allclose(logits(model, ids)[:, 4], logits(model, one_late)[:, 4])  # within a block both ways


def test_padding_on_the_left_shifts_no_block(model: MaskedDiffusionModel) -> None:
    ids = half_masked()
    padded = torch.cat((torch.full((4, 3), EOS), ids), 1)
    visible = torch.ones_like(padded)
    visible[:, :3] = 0
    torch.testing.assert_close(logits(model, padded, visible)[:, 3:], logits(model, ids), rtol=1e-4, atol=1e-5)


def test_every_token_is_counted_once_at_its_expert(model: MaskedDiffusionModel) -> None:
    made = states(model, OWN)
    total = sum(int(batch.visible_BL.sum()) for batch in made.batches)
    for visit in walk(model, made):
        seen = visit.collect(Collect(second_moment="state", rows=4))
        down = [seen[ExpertSite(Site.DOWN, index)] for index in range(EXPERTS)]
        assert sum(part.moments().count for part in down) == seen[Site.GATE_UP].moments().count == total
        assert all(0 < part.moments().count < total for part in down)


@torch.no_grad()
def test_statistics_of_an_expert_are_those_of_its_tokens(model: MaskedDiffusionModel) -> None:
    """Against a plain loop over tokens: which expert, which state."""
    made = states(model, OWN)
    visit = next(iter(walk(model, made)))
    seen = visit.collect(Collect(moments=False, second_moment="pooled"))[ExpertSite(Site.DOWN, 1)]
    block, rows = model.trunk().blocks[0], []
    for batch in made.batches:
        inputs: list[Tensor] = []
        handle = block.ff_norm.register_forward_hook(lambda _, __, out, into=inputs: into.append(out))
        model(batch.ids_BL, attention_mask=batch.visible_BL)
        handle.remove()
        for x_D in inputs[0][batch.visible_BL]:
            if int(block.router(x_D).argmax()) == 1:
                expert = block.experts[1]
                rows.append(F.silu(expert.gate(x_D)) * expert.up(x_D))
    rows_ND = torch.stack(rows).double()
    torch.testing.assert_close(seen.second_moment().mean, rows_ND.T @ rows_ND / len(rows_ND), rtol=1e-4, atol=1e-6)


def quantized(folder: Path, name: str, packed: bool = False) -> tuple[MaskedDiffusionModel, Method, list]:
    model, method = load_model(folder), METHODS.build(spec(f"method={name}").method)
    fitted = method.fit(model, w4a4(), states(model) if method.options.needs_calibration else None)
    return model, method, method.apply(model, fitted, w4a4(), packed=packed)


@pytest.mark.parametrize("name", ["rtn", "gptq", "flatquant"])
def test_w4a4_lists_every_experts_linears(folder: Path, name: str) -> None:
    full, (model, _, manifest) = load_model(folder), quantized(folder, name)
    linears = [entry for entry in manifest if entry.kind == "linear"]
    assert {entry.name for entry in linears} == set(full.linears())
    assert {(entry.weight_bits, entry.activation_bits) for entry in linears} == {(4, 4)}
    assert {entry.role for entry in linears} >= {"expert_0.down_proj", "expert_1.gate_proj", "q_proj"}
    change = logits(model, half_masked()) - logits(full, half_masked())
    assert 0 < float(change.norm() / logits(full, half_masked()).norm()) < 0.6
    for info in full.linears().values():
        assert len(model.get_submodule(info.name).weight[0].unique()) <= 16


@torch.no_grad()
def test_channels_that_a_router_reads_too_are_not_scaled(folder: Path) -> None:
    """FlatQuant's transforms of every expert, without rounding: the mixture's function, and its routes."""
    full, model = load_model(folder), load_model(folder)
    method = METHODS.build(spec("method=flatquant", "method.epochs=1").method)
    fitted = method.fit(model, w4a4(), states(model))
    names = {name for name in fitted.get("block_000") if name.endswith(".channel")}
    assert names == {"qkv_input.channel", "expert_0.down_input.channel", "expert_1.down_input.channel"}
    method.apply(model, fitted, spec("bits=w16a16").bits)
    torch.testing.assert_close(logits(model, half_masked()), logits(full, half_masked()), rtol=1e-3, atol=1e-4)


def test_gptq_loses_less_than_rounding_at_every_experts_down_projection(folder: Path) -> None:
    full = load_model(folder)
    rounded, solved = (quantized(folder, name)[0] for name in ("rtn", "gptq"))
    visit = next(iter(walk(full, states(full))))
    for site, seen in visit.collect(Collect(moments=False, second_moment="pooled")).items():
        hessian = seen.second_moment().mean
        for role, linear in visit.sites.readers(site).items():
            name = next(i.name for i in visit.linears.values() if i.role == role)
            losses = []
            for model in (rounded, solved):
                delta = model.get_submodule(name).weight.double() - linear.weight.double()
                losses.append(float(((delta @ hessian) * delta).sum().detach()))
            assert losses[1] < losses[0], name


class AlwaysFirst(nn.Linear):
    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.new_tensor([1.0, 0.0]).expand(*x_BLD.shape[:-1], EXPERTS)


@pytest.mark.parametrize("name", ["gptq", "dllmquant_plus"])
@pytest.mark.parametrize("rare", ["pooled", "round"])
def test_an_expert_that_no_token_reaches_is_noted_and_named(folder: Path, name: str, rare: str) -> None:
    model, (method, _) = load_model(folder), method_named(name)
    model.blocks[0].router = AlwaysFirst(64, EXPERTS, bias=False)
    model.blocks[0].router.weight.data.zero_()
    fitted = method.fit(model, w4a4(), states(model, f"calibration.experts.rare={rare}"))
    said = {note["where"]: note["what"] for note in fitted.notes if note["what"] in RARE.values()}
    site = "blocks.0.experts.1.down_input"
    assert said[site] == RARE[rare]
    manifest = {entry.name: entry for entry in method.apply(model, fitted, w4a4())}
    assert manifest["blocks.0.experts.1.down"].calibration == RARE[rare]
    assert {entry.site for entry in manifest.values() if entry.calibration} == {*said}
    assert manifest["blocks.0.experts.1.down"].weight_bits == 4
    assert bool(logits(model, half_masked()).isfinite().all())


@torch.no_grad()
def test_pooled_statistics_are_those_of_all_tokens_of_the_layer(folder: Path) -> None:
    """Against a plain loop: the expert run on every visible token, whichever the router chooses."""
    model = load_model(folder)
    made = states(model, "calibration.experts.least_tokens=1000")  # every expert is rare
    visit, rows = next(iter(walk(model, made))), []
    seen = visit.collect(Collect(second_moment="pooled", rows=3), (ExpertSite(Site.DOWN, 1),))[ExpertSite(Site.DOWN, 1)]
    block, expert = model.trunk().blocks[0], model.trunk().blocks[0].experts[1]
    for batch in made.batches:
        inputs: list[Tensor] = []
        handle = block.ff_norm.register_forward_hook(lambda _, __, out, into=inputs: into.append(out))
        model(batch.ids_BL, attention_mask=batch.visible_BL)
        handle.remove()
        h_ND = inputs[0][batch.visible_BL]
        rows.append(F.silu(expert.gate(h_ND)) * expert.up(h_ND))
    rows_ND = torch.cat(rows).double()
    assert seen.moments().count == len(rows_ND) == sum(made.tokens(model))
    torch.testing.assert_close(seen.second_moment().mean, rows_ND.T @ rows_ND / len(rows_ND), rtol=1e-4, atol=1e-6)
    assert not visit.sites.inputs[ExpertSite(Site.DOWN, 1)]._forward_hooks


def test_likelihood_of_one_token_is_its_log_probability(model: MaskedDiffusionModel) -> None:
    prompt = tuple(words(8).tolist())
    [score] = LikelihoodEstimator(TOY.noise, 16).score(MaskPredictor(model), [ScoreRequest(prompt, (5,))])
    expected = logits(model, torch.tensor([[*prompt, MASK]]))[0, -1].log_softmax(-1)[5]
    assert score == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", [None, "rtn"])
@pytest.mark.parametrize("kv_cache", ["prefix", "dual"])
def test_generation_is_the_same_with_and_without_cached_keys(folder: Path, name: str | None, kv_cache: str) -> None:
    """Committed blocks see nothing behind them: reading their keys again is exact."""
    model = load_model(folder) if name is None else quantized(folder, name)[0]
    prompts = [words(8, seed=i).tolist() for i in range(3)]
    sampler, predict = LLaDASampler(steps=12, gen_length=12, block_length=BLOCK), MaskPredictor(model)
    plain = dict(generate_many(predict, prompts, sampler, batch_size=BatchSize(2)))
    cached = dict(
        generate_approximately(predict, prompts, sampler, SpeedSpec(kv_cache=kv_cache), batch_size=BatchSize(2))
    )
    assert cached == plain
    assert generate(model, torch.tensor(prompts), sampler)[:, 8:].tolist() == [plain[i] for i in range(3)]


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MaskedDiffusionModel, Path]]:
    FAMILIES.add("toy", f"{__name__}:TOY")
    model, _, _ = quantized(folder, "gptq", packed=True)
    target = tmp_path_factory.mktemp("packed") / "toy-w4a4"
    export(model, make_record(spec("bits=w4a4", "method=gptq")), folder, target)
    yield model, target
    FAMILIES._targets.pop("toy", None)


def test_a_packed_mixture_is_small_and_gives_the_same_logits(
    folder: Path, packed: tuple[MaskedDiffusionModel, Path]
) -> None:
    model, target = packed
    loaded, fake = load_model(target), quantized(folder, "gptq")[0]
    assert torch.equal(logits(loaded, half_masked()), logits(model, half_masked()))
    torch.testing.assert_close(logits(loaded, half_masked()), logits(fake, half_masked()), rtol=1e-5, atol=1e-5)
    expert = loaded.blocks[1].experts[1].down
    assert expert.codes.numel() * 2 == expert.in_features * expert.out_features
    assert torch.equal(dequantize(expert.quantized(), torch.float32), fake.blocks[1].experts[1].down.weight)


def test_integer_tokens_are_routed_to_experts(packed: tuple[MaskedDiffusionModel, Path]) -> None:
    loaded, integers = load_model(packed[1]), load_model(packed[1])
    assert use_integers(integers) == 2 * (3 + EXPERTS)
    torch.testing.assert_close(logits(integers, half_masked()), logits(loaded, half_masked()), rtol=1e-4, atol=1e-4)
