"""A packed checkpoint gives the calibrated model's numbers, loads from its folder alone, and is judged."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from starquant.diffusion import generate
from starquant.errors import CheckpointError, ConfigError
from starquant.evaluation.testbed_tasks import items
from starquant.kernels.packing import pack, unpack
from starquant.models import family_of, load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.models.context import Context
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.models.roles import Role, Site
from starquant.numerics.chunks import row_slices
from starquant.packed.completion import main
from starquant.packed.description import describe, use_integers
from starquant.packed.export import export
from starquant.quantized import activation_quantizer as sites
from starquant.quantized import joined_linears
from starquant.quantized import packed_linear as packed_room
from starquant.quantized.activation_quantizer import ActivationQuantizer, Where
from starquant.quantized.folding import fold
from starquant.quantized.manifest import manifest_of
from starquant.quantized.packed_linear import PackedLinear
from starquant.quantized.state_transforms import SiteTransform
from starquant.runs.execute import execute
from starquant.store.exports import validate_listing, validate_target
from starquant.testbed.items import Split
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.methods import FOUR, fitted_once, method_named
from tests.support.models import fresh, logits
from tests.support.records import make_record
from tests.support.specs import OPTIONS, spec

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 7, 8, 9, 10]])
QUANTIZING = [name for name in OPTIONS["method"] if name not in ("none", "packed", "gguf")]


def ids_of(model: MaskedDiffusionModel) -> torch.Tensor:
    ids = IDS.clone()
    ids[:, 4:7] = model.mask_token_id
    return ids


def exported(name: str, architecture: str, folder: Path, **more: Any) -> tuple[MaskedDiffusionModel, Path]:
    """The calibrated model, and where it was exported to."""
    method, bits = method_named(name, *FOUR)
    calibrated, packed = fresh(architecture), fresh(architecture)
    method.apply(calibrated, fitted_once(name, architecture), bits)
    method.apply(packed, fitted_once(name, architecture), bits, packed=True)
    export(packed, make_record(spec()), weights_folder(0), folder / "packed", **more)
    return calibrated, folder / "packed"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported("star_quant", "llada_gqa", tmp_path_factory.mktemp("small"))[1]


FITTED_OTHERWISE = ("plus_folded", "star_quant_closed_form")  # and packed as quarot_folded and star_quant are
CASES = [
    pytest.param("llada_gqa", name, marks=pytest.mark.slow if name in FITTED_OTHERWISE else ()) for name in QUANTIZING
]
CASES += [("dream_gqa", name) for name in ("rtn", "smoothquant", "quarot", "dllmquant_plus_plus", "star_quant_plus")]
CASES += [("dream_gqa", "flatquant")]


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_logits_are_the_calibrated_models(name: str, architecture: str, tmp_path: Path) -> None:
    calibrated, folder = exported(name, architecture, tmp_path)
    loaded = load_model(folder)
    assert torch.equal(logits(loaded, ids_of(loaded)), logits(calibrated, ids_of(loaded)))
    again = AutoModel.from_pretrained(folder)
    assert torch.equal(logits(again, ids_of(loaded)), logits(loaded, ids_of(loaded)))
    assert (
        describe(again)
        == describe(loaded)
        == json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    )
    linears = [module for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 7 * loaded.config.num_hidden_layers
    assert all(linear.codes.shape[1] == linear.in_features // 2 for linear in linears)


@pytest.mark.parametrize("settings", [("bits=w8a8",), ("bits=w4a16",), ("bits=w3a3",)])
def test_other_widths_and_groups(settings: tuple[str, ...], tmp_path: Path) -> None:
    method, bits = method_named("rtn", *settings, "bits.weights.group_size=16", "bits.weights.symmetric=false")
    calibrated, packed = fresh("llada_gqa"), fresh("llada_gqa")
    fitted = method.fit(packed, bits)
    method.apply(calibrated, fitted, bits)
    method.apply(packed, fitted, bits, packed=True)
    export(packed, make_record(spec(*settings)), weights_folder(0), tmp_path / "p")
    loaded = load_model(tmp_path / "p")
    assert torch.equal(logits(loaded, ids_of(loaded)), logits(calibrated, ids_of(loaded)))


@pytest.mark.parametrize(("architecture", "bits"), [("llada_gqa", 8), ("dream_gqa", 8), ("llada_gqa", 4)])
def test_embedding_and_head_are_packed_too(architecture: str, bits: int, tmp_path: Path) -> None:
    ends = (f"bits.embedding={bits}", f"bits.head={bits}")
    method, spec_of_bits = method_named("rtn", "bits=w4a4", *ends)
    models = fresh(architecture), fresh(architecture)
    for model, packed in zip(models, (False, True), strict=True):
        method.apply(model, method.fit(model, spec_of_bits), spec_of_bits, packed=packed)
    size = export(models[1], make_record(spec()), weights_folder(0), tmp_path / "p")
    loaded = load_model(tmp_path / "p")
    assert torch.equal(logits(loaded, ids_of(loaded)), logits(models[0], ids_of(loaded)))
    sampler = family_of(loaded).sampler.of_length(8)
    assert torch.equal(*(generate(model, IDS, sampler) for model in (loaded, models[0])))
    again = AutoModel.from_pretrained(tmp_path / "p", dtype=torch.bfloat16)
    assert again.trunk().embedding(IDS).dtype == torch.bfloat16 and logits(again, ids_of(again)).isfinite().all()
    rows = loaded.trunk().embedding(IDS)
    loaded.to(torch.bfloat16)
    assert torch.equal(loaded.trunk().embedding(IDS), rows.bfloat16())
    words, width = loaded.trunk().embedding.num_embeddings, loaded.trunk().embedding.embedding_dim
    assert loaded.trunk().embedding.codes.nbytes == loaded.trunk().head.codes.nbytes == words * width * bits // 8
    values = sum(t.nbytes for t in models[0].state_dict().values())
    assert size < 0.5 * values
    ends_told = [e for e in manifest_of(loaded) if e.kind in ("embedding", "head")]
    assert [(e.kind, e.weight_bits, e.reason) for e in ends_told] == [("embedding", bits, None), ("head", bits, None)]


def test_a_tied_embedding_stays_values(tmp_path: Path) -> None:
    method, bits = method_named("rtn", "bits=w4a4", "bits.embedding=8", "bits.head=8")
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 48, "vocab_size": 200}
    torch.manual_seed(0)
    models = [
        LLaDAModelLM(LLaDAConfig(**sizes, mask_token_id=199, eos_token_id=198, weight_tying=True)).eval()
        for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    for model, packed in zip(models, (False, True), strict=True):
        method.apply(model, method.fit(model, bits), bits, packed=packed)
    export(models[1], make_record(spec()), weights_folder(0), tmp_path / "p")
    loaded = load_model(tmp_path / "p")
    assert torch.equal(logits(loaded, ids_of(loaded)), logits(models[0], ids_of(loaded)))


@pytest.mark.parametrize("name", ["rtn", "quarot", "star_quant", "star_quant_plus", "flatquant", "freeact"])
def test_the_integer_path_gives_the_same_up_to_rounding(name: str, tmp_path: Path) -> None:
    calibrated, folder = exported(name, "llada_gqa", tmp_path)
    loaded = load_model(folder)
    assert use_integers(loaded) == 4 * loaded.config.num_hidden_layers
    expected, found = logits(calibrated, ids_of(loaded)), logits(loaded, ids_of(loaded))
    # a code that lies on the edge of two may fall to either side, once sums are exact
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    use_integers(loaded, "never")
    assert torch.equal(logits(loaded, ids_of(loaded)), expected)


@pytest.mark.parametrize(("architecture", "name"), [("llada_gqa", "star_quant"), ("dream_gqa", "rtn")])
def test_linears_of_one_site_are_multiplied_as_one(
    architecture: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = exported(name, architecture, tmp_path)
    loaded, alone = load_model(folder), load_model(folder)
    use_integers(loaded, join="always"), use_integers(alone)
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    count: list[int] = []
    for room in (joined_linears, packed_room):
        whole = room.integer_linear
        monkeypatch.setattr(room, "integer_linear", lambda *given, whole=whole: count.append(1) or whole(*given))
    expected = logits(alone, ids_of(alone))
    assert len(count) == 7 * alone.config.num_hidden_layers
    count.clear()
    for _ in range(2):
        assert torch.equal(logits(loaded, ids_of(loaded)), expected)
    assert len(count) == 2 * 4 * loaded.config.num_hidden_layers
    state = loaded.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in state)
    attention = loaded.block_sites(loaded.trunk().blocks[0]).linears
    q, k = attention[Role.Q], attention[Role.K]
    assert q.codes.untyped_storage().data_ptr() == k.codes.untyped_storage().data_ptr()  # kept once
    for model in (loaded, alone):
        model.to(torch.bfloat16)
    assert torch.equal(logits(loaded, ids_of(loaded)), logits(alone, ids_of(alone)))


@pytest.mark.parametrize("architecture", ["llada_gqa", "dream_gqa"])
def test_folded_corrections_keep_the_numbers(architecture: str, tmp_path: Path) -> None:
    calibrated, folder = exported("star_quant", architecture, tmp_path)
    loaded = load_model(folder)
    before = describe(loaded), list(loaded.state_dict())
    site = loaded.block_sites(loaded.trunk().blocks[0]).inputs[Site.OUT]
    assert isinstance(site.transform, SiteTransform) and site.transform.correction is not None
    x = torch.randn(2, 8, 96 if architecture == "llada_gqa" else loaded.config.hidden_size)
    context = Context(loaded.trunk().rotary(torch.arange(8)[None]), None, ids_of(loaded) == loaded.mask_token_id)
    both = fold(site.transform.correction, site.transform.exact)
    expected = site.transform.exact(site.transform.correction(x, context), context)
    torch.testing.assert_close(both(x), expected, rtol=1e-4, atol=1e-5)
    use_integers(loaded)
    assert site.prologue is not None and len(site.prologue.steps) == 1  # one map, which nothing else is left of
    found, whole = logits(loaded, ids_of(loaded)), logits(calibrated, ids_of(loaded))
    assert float((found - whole).norm() / whole.norm()) < 0.02  # codes on an edge may fall to the other side
    assert (describe(loaded), list(loaded.state_dict())) == before


def test_a_model_moved_later_uses_integers_there(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(small)
    quantizers = [m for m in loaded.modules() if isinstance(m, ActivationQuantizer)]
    assert len(quantizers) == 8 and {site.integers for site in quantizers} == {"on_gpu"}
    assert not any(site.joined for site in quantizers)  # on a CPU weights stay in the file's memory

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(sites, "quantize_tokens", lambda *_: "integers")
    context = Context((torch.ones(1), torch.ones(1)), None, torch.arange(8)[None] % 2 == 0)
    sites_of_block = loaded.block_sites(loaded.trunk().blocks[0])
    x, site = torch.randn(1, 8, 96), sites_of_block.inputs[Site.OUT]
    assert isinstance(site(x, context), torch.Tensor) and site.prologue is None
    site._apply(lambda tensor: tensor.as_subclass(OnGpu))  # as a move does
    assert site.prologue is not None and site(x.as_subclass(OnGpu), context) == "integers"
    site, q, k = sites_of_block.inputs[Site.QKV], *(sites_of_block.linears[role] for role in (Role.Q, Role.K))
    codes = q.codes.clone()
    site._apply(lambda tensor: tensor.as_subclass(OnGpu))  # before its linears are moved
    assert q.codes.is_cuda and torch.equal(q.codes, codes)
    assert len({t.untyped_storage().data_ptr() for t in (q.codes, k.codes, site.joined.codes)}) == 1


@pytest.mark.parametrize("moved", ["block", "linears first"])
def test_joined_weights_follow_a_move(moved: str, small: Path) -> None:
    """The linears keep views of one memory; the empty one of the meta device tells that all of it has moved."""
    loaded = load_model(small)
    use_integers(loaded, join="always")
    block = loaded.trunk().blocks[0]
    sites = loaded.block_sites(block)
    if moved == "linears first":
        for linear in sites.linears.values():
            linear.to("meta")
    block.to("meta", torch.float64)
    for name, site in sites.inputs.items():
        assert isinstance(site, ActivationQuantizer) and site.prologue is not None
        readers = list(sites.readers(name).values())
        assert [linear.codes.device.type for linear in readers] == ["meta"] * len(readers)
        if site.joined is not None:
            assert site.joined.codes.device.type == site.joined.scale.device.type == "meta"
            assert site.joined.scale.dtype == torch.float32
            assert [linear.place for linear in readers] == list(range(len(readers)))
            for linear in readers:
                assert linear.codes._base is site.joined.codes and linear.scale._base is site.joined.scale


def test_a_cast_leaves_scales_and_transforms_alone(small: Path) -> None:
    loaded = load_model(small)
    before = {name: b.clone() for name, b in loaded.named_buffers() if b.dtype == torch.float32 and "keep" not in name}
    loaded.to(torch.bfloat16)
    assert all(
        torch.equal(dict(loaded.named_buffers())[name], was) for name, was in before.items() if "clip" not in name
    )
    assert logits(loaded, ids_of(loaded)).isfinite().all() and loaded.trunk().embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["star_quant", "dllmquant_plus_plus"])
def test_half_precision_is_exact_too(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Clip ratios, gates and static scales of V keep float32 in a model of 16 bits."""
    method, bits = method_named(name, *FOUR)
    models = [fresh("llada_gqa").to(dtype) for _ in range(2)]
    for model, packed in zip(models, (False, True), strict=True):
        method.apply(model, fitted_once(name, "llada_gqa"), bits, packed=packed)
    export(models[1], make_record(spec()), weights_folder(0), tmp_path / "p")
    for loaded in (load_model(tmp_path / "p"), AutoModel.from_pretrained(tmp_path / "p")):
        assert torch.equal(logits(loaded, ids_of(loaded)), logits(models[0], ids_of(loaded)))
        assert {b.dtype for b in loaded.buffers()} == {torch.uint8, torch.float32}
    kinds = {header["dtype"] for header in _header(tmp_path / "p" / "model.safetensors").values()}
    assert kinds == {"U8", "F32", {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]}


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        found: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found.pop("__metadata__", None)
    return found


def test_half_precision_and_shards(tmp_path: Path) -> None:
    method, bits = method_named("quarot", *FOUR)
    models = [fresh("llada_gqa").to(torch.bfloat16) for _ in range(2)]
    for model, packed in zip(models, (False, True), strict=True):
        method.apply(model, fitted_once("quarot", "llada_gqa"), bits, packed=packed)
    export(models[1], make_record(spec()), weights_folder(0), tmp_path / "p", shard_size="20KB")
    assert len(list((tmp_path / "p").glob("*.safetensors"))) > 2
    loaded = load_model(tmp_path / "p")
    assert loaded.trunk().embedding.weight.dtype == torch.bfloat16
    linear = next(module for module in loaded.modules() if isinstance(module, PackedLinear))
    assert linear.scale.dtype == torch.float32
    assert torch.equal(logits(loaded, ids_of(loaded)), logits(models[0], ids_of(loaded)))
    next((tmp_path / "p").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"1 of \d+ shards are missing"):
        load_model(tmp_path / "p")


def test_packed_blocks_stay_in_memory(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"^blocks_on_disk: .*packed is packed; allowed: a full-precision checkpoint"):
        load_model(small, blocks_on_disk=True)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["always", "never"])
def test_a_packed_block_compiles_whole(where: Where, small: Path) -> None:
    """One graph a block: what lies between the products can be fused, also around kernels."""
    loaded = load_model(small)
    use_integers(loaded, where)
    expected = logits(loaded, ids_of(loaded))
    for block in loaded.trunk().blocks:
        block.compile(dynamic=True, fullgraph=True)
    found = logits(loaded, ids_of(loaded))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_completion_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    folder = weights_folder(0)  # whose tokenizer fits
    item = items("arithmetic", Split.TEST)[0]
    assert main([str(folder), item.prompt, "--length", "8"]) == 0
    assert capsys.readouterr().out.strip() == item.answer
    assert main([str(folder), "1", "--length", "8", "--steps", "3", "--block-length", "4"]) == 2
    assert capsys.readouterr().err == "error: steps: got 3, must be a multiple of the 2 blocks\n"
    assert main([str(folder), "1", "--length", "8", "--graphs"]) == 2
    assert capsys.readouterr().err == "error: --graphs: got --device cpu, allowed: a GPU\n"
    assert main([str(folder / "nothing"), "1"]) == 2
    assert "no such checkpoint folder" in capsys.readouterr().err


def test_without_an_end_of_text_no_answer_can_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = damaged(weights_folder(0), tmp_path, lambda config, _: config.update(eos_token_id=None))
    assert main([str(folder), "1", "--length", "4"]) == 2
    assert "config.json: eos_token_id is None; needed: where an answer ends" in capsys.readouterr().err


def damaged(folder: Path, tmp_path: Path, change: Any) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    tensors = load_file(copy / "model.safetensors")
    change(config, tensors)
    (copy / "config.json").write_text(json.dumps(config))
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def _first(found: dict[str, Any], kind: str, end: str = "") -> dict[str, Any]:
    data: dict[str, Any] = next(data for name, data in found.items() if data["kind"] == kind and name.endswith(end))
    return data


def _changed(kind: str, end: str = "", **more: Any) -> Any:
    """Change the description of the first module of a kind."""
    return lambda config, _: _first(config["quantization_config"]["modules"], kind, end).update(more)


def _transform(**parts: Any) -> Any:
    return _changed(
        "site", transform={"kind": "site_transform", "exact": None, "correction": None, "gate": None} | parts
    )


FIRST = "model.transformer.blocks.0.q_proj.codes"
FAULTS: dict[str, tuple[Any, str]] = {
    "newer": (
        lambda config, _: config["quantization_config"].update(version=3),
        r"config.json: quantization_config.version: got 3, this version reads 2; a later starquant wrote it",
    ),
    "older": (  # whose gates had the rows of the two states the other way round
        lambda config, _: config["quantization_config"].update(version=1),
        r"config.json: quantization_config.version: got 1, this version reads 2$",
    ),
    "other method": (
        lambda config, _: config["quantization_config"].update(quant_method="gptq"),
        r"config.json: quantization_config.quant_method is 'gptq'; allowed: starquant",
    ),
    "no modules": (
        lambda config, _: config["quantization_config"].pop("modules"),
        r"config.json: quantization_config.modules: missing",
    ),
    "other shape": (lambda config, _: config.update(vocab_size=208), r"parameters are misshapen: .*wte.weight"),
    "other width": (
        lambda config, _: config.update(mlp_hidden_size=224),
        r"modules: .*down_input: width: got 160, allowed: 224",
    ),
    "version that is no number": (
        lambda config, _: config["quantization_config"].update(version=True),
        r"quantization_config.version: got True, this version reads 2$",
    ),
    "bits that are no whole number": (
        _changed("packed_linear", bits=4.0),
        r"modules: .*: bits: got 4.0, allowed: 2 to 8",
    ),
    "symmetric in words": (
        _changed("packed_linear", symmetric="no"),
        r"modules: .*: symmetric: got 'no', allowed: true, false",
    ),
    "key from elsewhere": (_changed("packed_linear", order=[1]), r"modules: .*: packed_linear: keys unknown: order"),
    "group size without end": (
        _changed("packed_linear", group_size=10**30),
        r"group_size: got 10{19}, allowed: 1 to 96",
    ),
    "clip ratio": (
        _changed("site", grid={"bits": 4, "symmetric": True, "clip_ratio": 0}),
        r"modules: .*: clip_ratio: got 0, allowed: above 0, at most 1",
    ),
    "gate wider than the site": (
        _transform(gate={"kind": "state_gate", "width": 96, "d_m": 90, "d_u": 7}),
        r"modules: .*: d_u: got 7, allowed: 0 to 6",
    ),
    "blocks across heads": (
        _changed("site", "out_input", transform={"kind": "block_affine", "shape": [1, 2, 48]}),
        r"modules: .*out_input: shape: got 2 blocks of g = 48, allowed: 96 channels in all, g a divisor of head_dim 16",
    ),
    "maps of one and a half bins": (
        _changed("site", "out_input", transform={"kind": "block_affine", "shape": [3, 6, 16]}),
        r"modules: .*out_input: shape: got 3 conditions, allowed: 1, or 2 token states a bin",
    ),
    "attention bits": (
        _changed("attention", bits={"q": 16, "k": 16, "p": 16, "v": 4.0}),
        r"modules: .*: bits.v: got 4.0, allowed: 2 to 8, 16",
    ),
    "fewer layers": (
        lambda config, _: config.update(n_layers=1),
        r"quantization_config.modules: .*blocks.1.*: the model has no such module",
    ),
    "group size": (
        lambda config, _: _first(config["quantization_config"]["modules"], "packed_linear").update(group_size=7),
        r"quantization_config.modules: .*group_size 7 does not divide 96 inputs",
    ),
    "unknown transform": (
        lambda config, _: _first(config["quantization_config"]["modules"], "site").update(transform={"kind": "magic"}),
        r"quantization_config.modules: .*: transform kind: got 'magic', allowed: hadamard, .*",
    ),
    "codes of another dtype": (
        lambda _, tensors: tensors.update({FIRST: tensors[FIRST].float()}),
        r"1 parameters are of another dtype: .*q_proj.codes is stored as F32, allowed: U8",
    ),
    "clip ratio of a state": (
        lambda _, tensors: tensors["model.transformer.blocks.0.qkv_input.state_clip"].fill_(-1.0),
        r"qkv_input.state_clip: got -1, -1, allowed: above 0",
    ),
    "a transform that is no number": (
        lambda _, tensors: next(t for name, t in tensors.items() if name.endswith("matrix_CNGG")).fill_(torch.inf),
        r"matrix_CNGG holds values that are not finite",
    ),
    "keys of another version": (
        lambda config, _: config["quantization_config"].update(order="new"),
        r"quantization_config: unknown: order",
    ),
    "modules that are no object": (
        lambda config, _: config["quantization_config"].update(modules=[]),
        r"quantization_config.modules: got '\[\]', allowed: an object",
    ),
    "no quantization config": (
        lambda config, _: config.update(quantization_config=None),
        r"parameters are missing: .*q_proj.weight",
    ),
    "a dtype that weights cannot have": (
        lambda config, _: config.update(dtype="int8"),
        r"dtype: got 'int8', allowed: float32, bfloat16, float16",
    ),
    "missing codes": (
        lambda _, tensors: tensors.pop("model.transformer.blocks.0.q_proj.codes"),
        r"1 parameters are missing: model.transformer.blocks.0.q_proj.codes",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_named(fault: str, small: Path, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    folder = damaged(small, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)
    if fault == "a dtype that weights cannot have":  # transformers reads it first
        return
    if fault != "other method":  # which is another plug-in's
        with pytest.raises(CheckpointError, match=message.removeprefix("config.json: ")):
            AutoModel.from_pretrained(folder)


def test_a_scale_that_is_no_number_is_named(small: Path, tmp_path: Path) -> None:
    name = "model.transformer.blocks.1.q_proj.scale"
    folder = damaged(small, tmp_path, lambda _, tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf"{name}: got values that are not positive numbers"):
        load_model(folder)


def test_gates_that_are_not_those_of_their_widths_are_named(small: Path, tmp_path: Path) -> None:
    def change(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("keep_SD"))
        tensors[name][0, 0] = 0.0

    folder = damaged(small, tmp_path, change)
    with pytest.raises(CheckpointError, match=r"keep_SD: got other channels than gates 5 masked, 5 unmasked keep"):
        load_model(folder)


def rounded(folder: Path, *settings: str) -> None:
    """Export what round to nearest makes."""
    method, bits = method_named("rtn", *settings)
    packed = fresh("llada_gqa")
    method.apply(packed, method.fit(packed, bits), bits, packed=True)
    export(packed, make_record(spec(*settings)), weights_folder(0), folder)


@pytest.mark.parametrize("damage", ["no entry", "no grid", "16 bits"])
def test_a_site_that_is_not_described_is_named(small: Path, tmp_path: Path, damage: str) -> None:
    """It would run at 16 bits, in a model that says it has 4."""
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    config = json.loads((folder / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    name = next(name for name, data in modules.items() if data["kind"] == "site" and name.endswith("qkv_input"))
    if damage == "no entry":
        del modules[name]
    elif damage == "no grid":
        modules[name]["grid"] = None
    else:
        modules[name]["grid"]["bits"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"modules: {name}: (got .*, needed: site of 4 bits|.*bits: got 16)"):
        load_model(folder)


def test_codes_beyond_the_grid_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_room, "row_slices", functools.partial(row_slices, numbers=10))
    rounded(tmp_path / "p", "bits=w4a4", "bits.weights.bits=3")
    name = "model.transformer.blocks.0.k_proj.codes"
    folder = damaged(tmp_path / "p", tmp_path, lambda _, tensors: tensors[name][-1].fill_(255))
    with pytest.raises(CheckpointError, match=rf"{name}: got torch.uint8 up to 15, allowed: uint8 up to 7"):
        load_model(folder)


def test_a_truncated_file_is_named(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: truncated"):
        load_model(copy)


def test_nothing_is_overwritten(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"^export.dir: .*packed: is there already; allowed: a new or empty folder$"):
        export(fresh("llada_gqa"), make_record(spec()), weights_folder(0), small)


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    for name in (".packed.unfinished-x1", ".packed.mine", ".other.unfinished-x1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("x")
    exported("rtn", "llada_mha", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.unfinished-x1", ".packed.mine", "packed"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_an_export_is_compared_with_what_was_written(name: str, damage: str, tmp_path: Path) -> None:
    folder = exported("rtn", "llada_mha", tmp_path)[1]
    validate_listing(folder)
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).unlink()
    if damage == "changed":
        (folder / name).write_bytes(content)
    why = "is missing" if damage == "missing" else "is not what was written"
    with pytest.raises(ConfigError, match=rf"^export.dir: .*{name}: {why}; remove .*packed to export again$"):
        validate_listing(folder)


def test_where_a_disk_is_mounted_nothing_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(ConfigError, match=r"^export.dir: .*: is where a disk is mounted; allowed: a folder below it$"):
        validate_target(tmp_path)
    validate_target(tmp_path / "below")


def test_a_run_exports_what_it_scored(tmp_path: Path) -> None:
    given = ("tasks.limit=2", "fidelity=none", "tasks.names=[testbed_facts]", f"paths.results={tmp_path / 'r'}")
    run = spec("method=quarot_rtn", *given, f"export.dir={tmp_path / 'out'}", "export.shard_size=1MB")
    execute(run)
    loaded = load_model(tmp_path / "out")
    assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == 7 * loaded.config.num_hidden_layers
    assert "| testbed_facts | acc (none) | 100.00 | 2 |" in (tmp_path / "out" / "README.md").read_text()
    assert main([str(tmp_path / "out"), "the city of ada is", "--length", "8"]) == 0
    weights = tmp_path / "out" / "model.safetensors"
    weights.rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"out: .*safetensors"):  # not taken for an export
        execute(run)
    (tmp_path / "kept").rename(weights)
    stamp = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    assert execute(run).reused and (tmp_path / "out" / "config.json").stat().st_mtime_ns == stamp  # it is this run's
    with pytest.raises(ConfigError, match=r"^export\.dir: .*out: is there already"):
        execute(spec("method=quarot_rtn", *given, "bits.weights.bits=3", f"export.dir={tmp_path / 'out'}"))
    for refused in (("method=none",), ("method=quarot_rtn", "stage=calibrate")):
        with pytest.raises(ConfigError, match=r"^export\.dir: got method=.* stage=.*, but a quantized model"):
            execute(spec(*refused, *given, f"export.dir={tmp_path / 'other'}"))


def test_the_card_tells_what_it_is(small: Path) -> None:
    card = (small / "README.md").read_text()
    assert card.startswith("# packed\n") and "AutoModel.from_pretrained" in card and "rtn, w4a4" in card
    assert (small / "tokenizer.json").exists()


def test_a_zero_point_that_is_no_code_is_named(tmp_path: Path) -> None:
    rounded(tmp_path / "p", "bits=w4a16", "bits.weights.symmetric=false")
    name = "model.transformer.blocks.0.k_proj.zero"
    folder = damaged(tmp_path / "p", tmp_path, lambda _, tensors: tensors[name].fill_(0.5))
    with pytest.raises(
        CheckpointError, match=rf"{name}: got values that are no codes, allowed: whole numbers, 0 to 15"
    ):
        load_model(folder)


def test_a_folder_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert spec("export.dir='~/packed'").export.dir == str(tmp_path / "packed")


def test_packing_is_undone_by_unpacking() -> None:
    codes = torch.randint(0, 16, (5, 12), dtype=torch.uint8)
    assert pack(codes).shape == (5, 6) and torch.equal(unpack(pack(codes)), codes)
    with pytest.raises(CheckpointError, match="got 3 inputs, allowed: an even number"):
        pack(codes[:, :3])
