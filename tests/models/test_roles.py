"""The declared roles of the linears: complete, without the head, and truly reading the sites they name."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from starquant.models.base import MaskedDiffusionModel
from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.models.roles import LinearInfo, Role
from tests.support.paths import GOLDEN, golden_arrays

LLADA_NAMES = dict(zip(Role, "q_proj k_proj v_proj attn_out ff_proj up_proj ff_out".split(), strict=True))
DREAM_NAMES = {role: f"self_attn.{role.value}" for role in (Role.Q, Role.K, Role.V)}
DREAM_NAMES |= {Role.OUT: "self_attn.o_proj"}
DREAM_NAMES |= {role: f"mlp.{role.value}" for role in (Role.GATE, Role.UP, Role.DOWN)}
# folder of the config -> classes, number of linears, where blocks are, name in a block by role,
# widths of model, feed-forward and keys
PUBLISHED = {
    "llada_8b_instruct": (LLaDAModelLM, LLaDAConfig, 224, "model.transformer.blocks", LLADA_NAMES, 4096, 12288, 4096),
    "dream_v0_instruct_7b": (DreamModel, DreamConfig, 196, "model.layers", DREAM_NAMES, 3584, 18944, 512),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest) -> tuple[str, MaskedDiffusionModel, dict[str, LinearInfo]]:
    model_class, config_class, *_ = PUBLISHED[request.param]
    with torch.device("meta"):
        model = model_class(config_class.from_pretrained(GOLDEN / "real_configs" / request.param))
    return request.param, model, model.linears()


def test_count(published: tuple[str, MaskedDiffusionModel, dict[str, LinearInfo]]) -> None:
    name, _, linears = published
    assert len(linears) == PUBLISHED[name][2]
    assert len({id(info.module) for info in linears.values()}) == len(linears)


def test_every_block_has_every_role_under_its_published_name(
    published: tuple[str, MaskedDiffusionModel, dict[str, LinearInfo]],
) -> None:
    name, model, linears = published
    prefix, names = PUBLISHED[name][3:5]
    blocks = model.config.num_hidden_layers
    assert Counter((info.block, info.role) for info in linears.values()) == Counter(
        {(block, role): 1 for block in range(blocks) for role in Role}
    )
    for key, info in linears.items():
        assert key == info.name == f"{prefix}.{info.block}.{names[info.role]}"
        assert model.get_submodule(key) is info.module


def test_shapes_fit_the_roles(published: tuple[str, MaskedDiffusionModel, dict[str, LinearInfo]]) -> None:
    name, _, linears = published
    d, f, kv = PUBLISHED[name][5:]
    into = {Role.OUT: (d, d), Role.Q: (d, d), Role.K: (kv, d), Role.V: (kv, d)}
    into |= {Role.GATE: (f, d), Role.UP: (f, d), Role.DOWN: (d, f)}
    for info in linears.values():
        assert tuple(info.module.weight.shape) == into[info.role]


def test_all_linears_but_the_head(published: tuple[str, MaskedDiffusionModel, dict[str, LinearInfo]]) -> None:
    _, model, linears = published
    head = model.get_output_embeddings()
    everything = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head_name = next(name for name, module in model.named_modules() if module is head)
    assert head_name in ("model.transformer.ff_out", "lm_head")
    assert set(linears) == everything - {head_name}
    assert all(info.module is not model.get_input_embeddings() for info in linears.values())


def test_llada_down_projections_survive_their_shared_name_with_the_head() -> None:
    model = LLaDAModelLM(LLaDAConfig(d_model=8, n_heads=2, n_layers=3, mlp_hidden_size=12, vocab_size=16))
    called_ff_out = {name for name, _ in model.named_modules() if name.endswith("ff_out")}
    down = {name for name, info in model.linears().items() if info.role is Role.DOWN}
    assert called_ff_out - down == {"model.transformer.ff_out"}
    assert len(down) == 3


def test_tied_llada_has_no_head_and_the_same_linears() -> None:
    sizes = {"d_model": 8, "n_heads": 2, "n_layers": 3, "mlp_hidden_size": 12, "vocab_size": 16}
    tied, untied = (LLaDAModelLM(LLaDAConfig(**sizes, weight_tying=tying)) for tying in (True, False))
    assert tied.get_output_embeddings() is None
    assert list(tied.linears()) == list(untied.linears())


def test_sites_are_shared_by_qkv_and_by_gate_and_up(
    published: tuple[str, MaskedDiffusionModel, dict[str, LinearInfo]],
) -> None:
    _, model, linears = published
    groups: dict[tuple[int, str], set[Role]] = {}
    for info in linears.values():
        groups.setdefault((info.block, info.site), set()).add(info.role)
    want = [{Role.Q, Role.K, Role.V}, {Role.OUT}, {Role.GATE, Role.UP}, {Role.DOWN}]
    for block in range(model.config.num_hidden_layers):
        found = [roles for (index, _), roles in groups.items() if index == block]
        assert sorted(found, key=sorted) == sorted(want, key=sorted)
    assert len(groups) == 4 * model.config.num_hidden_layers, "no site serves two blocks"


@torch.no_grad()
def test_linears_read_exactly_what_their_site_gives(family: str, golden_model: MaskedDiffusionModel) -> None:
    given: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    linears = golden_model.linears()
    for info in linears.values():
        site = golden_model.get_submodule(info.site)
        site.register_forward_hook(lambda _m, _i, out, name=info.site: given.__setitem__(name, out))
        info.module.register_forward_pre_hook(lambda _m, args, name=info.name: read.__setitem__(name, args[0]))
    golden_model(torch.from_numpy(golden_arrays(family)["input_ids"]))
    for info in linears.values():
        assert read[info.name] is given[info.site], info.name


@torch.no_grad()
def test_every_site_is_on_the_path_to_the_logits(family: str, golden_model: MaskedDiffusionModel) -> None:
    ids = torch.from_numpy(golden_arrays(family)["input_ids"])
    plain = golden_model(ids).logits
    for site in sorted({info.site for info in golden_model.linears().values()}):
        handle = golden_model.get_submodule(site).register_forward_hook(lambda _m, _i, out: out * 1.5)
        assert (golden_model(ids).logits - plain).abs().max() > 1e-2, site
        handle.remove()
    assert torch.equal(golden_model(ids).logits, plain)
