"""Blocks on disk: the same numbers as in memory, one block at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from starquant.calibration.site_statistics import Collect
from starquant.calibration.walk import walk
from starquant.config.bits import ActivationSpec, BitsSpec, WeightSpec
from starquant.diffusion import DreamSampler, LLaDASampler
from starquant.diffusion.trajectories import record_trajectory
from starquant.errors import CheckpointError, ConfigError
from starquant.models import family_of, load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.models.blocks_on_disk import StoredBlocks
from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.numerics import BIDIRECTIONAL
from starquant.quantized.install import quantize_block, round_to_nearest
from starquant.quantized.tables import is_tied
from tests.support.models import hooks_of, llada_gqa
from tests.support.states import partly_masked


@pytest.fixture
def folder(golden_model: MaskedDiffusionModel, tmp_path: Path) -> Path:
    """A golden model in many files, blocks spread over several of them."""
    golden_model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    return tmp_path


def _tied_llada() -> MaskedDiffusionModel:
    return llada_gqa(weight_tying=True)


def _tied_dream() -> MaskedDiffusionModel:
    torch.manual_seed(2)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = DreamConfig(**sizes, num_key_value_heads=2, vocab_size=200, mask_token_id=199, tie_word_embeddings=True)
    return DreamModel(config).eval()


def logits(model: MaskedDiffusionModel, padded: bool = False) -> Tensor:
    ids = torch.randint(0, 190, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.inference_mode():
        return model(ids, mask if padded else None).logits


def all_on_meta(model: MaskedDiffusionModel) -> bool:
    return all(p.is_meta for p in model.trunk().blocks.parameters())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_logits_are_identical(folder: Path, dtype: str | None) -> None:
    resident, hollow = load_model(folder, dtype=dtype), load_model(folder, dtype=dtype, blocks_on_disk=True)
    assert all_on_meta(hollow)
    assert (hollow.dtype, hollow.device, hollow.training) == (resident.dtype, resident.device, False)
    for padded in (False, True):
        assert torch.equal(logits(hollow, padded), logits(resident, padded))
        assert all_on_meta(hollow)
    assert {n: p.shape for n, p in hollow.named_parameters()} == {n: p.shape for n, p in resident.named_parameters()}


def test_hidden_states_are_identical(folder: Path) -> None:
    ids = torch.arange(12)[None]
    passes = []
    for on_disk in (False, True):
        with torch.no_grad():
            passes.append(load_model(folder, blocks_on_disk=on_disk)(ids, output_hidden_states=True).hidden_states)
    assert all(torch.equal(a, b) for a, b in zip(*passes, strict=True))


@pytest.mark.parametrize("make", [_tied_llada, _tied_dream])
def test_tied_heads_stay_tied(make: Callable[[], MaskedDiffusionModel], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, max_shard_size="20KB")
    hollow = load_model(tmp_path, blocks_on_disk=True)
    assert is_tied(hollow)
    assert torch.equal(logits(hollow), logits(load_model(tmp_path)))


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    _tied_dream().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, file, metadata={"format": "pt"})
    assert is_tied(load_model(tmp_path, blocks_on_disk=True))
    save_file(tensors | {"lm_head.weight": embedding + 1}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored and differs"):
        load_model(tmp_path, blocks_on_disk=True)


@pytest.mark.parametrize("named", ["float32", "bfloat16"])
def test_files_of_several_dtypes_are_read_as_one(folder: Path, named: str) -> None:
    """As in memory: the dtype that config.json names."""
    for file in folder.glob("*.safetensors"):
        mixed = {name: t.bfloat16() if t.ndim == 2 else t for name, t in load_file(file).items()}
        save_file(mixed, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": named}))
    resident, hollow = load_model(folder), load_model(folder, blocks_on_disk=True)
    assert resident.dtype == hollow.dtype == getattr(torch, named)
    assert torch.equal(logits(hollow), logits(resident))


def test_one_block_is_in_memory_while_it_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hollow = load_model(folder, dtype="bfloat16", blocks_on_disk=True)
    blocks, order, read = hollow.trunk().blocks, [], []
    plain = StoredBlocks.read
    monkeypatch.setattr(StoredBlocks, "read", lambda self, name, *rows: read.append(name) or plain(self, name, *rows))

    def resident(_: nn.Module, __: object) -> None:
        full = [k for k, block in enumerate(blocks) if not any(p.is_meta for p in block.parameters())]
        touched = [k for k, block in enumerate(blocks) if not all(p.is_meta for p in block.parameters())]
        assert full == touched
        assert {p.dtype for p in blocks[full[0]].parameters()} == {torch.bfloat16}
        order.append(full)

    for info in hollow.linears().values():
        info.module.register_forward_pre_hook(resident)
    logits(hollow)
    assert order == [[k] for k in range(3) for _ in range(7)]
    prefixes = tuple(f"{hollow.block_name(k)}." for k in range(3))
    assert sorted(read) == sorted(name for name, _ in hollow.named_parameters() if name.startswith(prefixes))


def test_a_walk_gives_the_same_statistics(folder: Path) -> None:
    resident, hollow = load_model(folder), load_model(folder, blocks_on_disk=True)
    states, plan = partly_masked(resident), Collect(second_moment="bin", weighted=True, rows=7)
    before, hooks = digests(folder), hooks_of(hollow)
    for ours, theirs in zip(walk(resident, states), walk(hollow, states), strict=True):
        assert all_on_meta(hollow)
        assert hooks_of(theirs.block) == []
        assert set(ours.linears) == set(theirs.linears)
        mine, other = ours.collect(plan), theirs.collect(plan)
        for site in mine:
            for state in (None, *BIDIRECTIONAL):
                first, second = mine[site].moments(state), other[site].moments(state)
                for name in ("count", "mean", "variance", "mean_abs", "absmax"):
                    assert torch.equal(torch.as_tensor(getattr(first, name)), torch.as_tensor(getattr(second, name)))
                assert torch.equal(mine[site].second_moment(state).mean, other[site].second_moment(state).mean)
                assert torch.equal(mine[site].rows(state), other[site].rows(state))
    assert all_on_meta(hollow)
    assert hooks_of(hollow) == hooks
    assert digests(folder) == before


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_walk_holds_one_copy_at_a_time(folder: Path, on_disk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from starquant.calibration import walk as engine

    model = load_model(folder, blocks_on_disk=on_disk)
    copies: list[weakref.ref[nn.Module]] = []
    plain = engine.resident_block

    def counted(model: MaskedDiffusionModel, index: int) -> nn.Module:
        assert [ref for ref in copies if ref() is not None] == []
        block = plain(model, index)
        copies.append(weakref.ref(block))
        return block

    monkeypatch.setattr(engine, "resident_block", counted)
    for visit in walk(model, partly_masked(model)):
        visit.collect(Collect())
    assert len(copies) == 3


def test_changing_a_copy_changes_neither_files_nor_model(folder: Path) -> None:
    hollow = load_model(folder, blocks_on_disk=True)
    exact, before = logits(hollow), digests(folder)
    bits = BitsSpec(name="test", weights=WeightSpec(bits=3), activations=ActivationSpec(bits=4))
    for visit in walk(hollow, partly_masked(hollow, inputs="quantized")):
        quantize_block(hollow, visit.block, visit.index, bits, round_to_nearest)
        with torch.no_grad():
            for parameter in visit.block.parameters():
                parameter.zero_()
    assert digests(folder) == before
    assert torch.equal(logits(hollow), exact)


def test_trajectories_are_identical(folder: Path) -> None:
    found = []
    for on_disk in (False, True):
        model = load_model(folder, blocks_on_disk=on_disk)
        if family_of(model).name == "llada":
            sampler = LLaDASampler(steps=6, gen_length=12, block_length=12)
        else:
            sampler = DreamSampler(steps=6, max_new_tokens=12)
        found.append(record_trajectory(model, torch.tensor([[5, 6, 7], [8, 9, 10]]), sampler, seed=3))
    assert torch.equal(found[0].ids_SBL, found[1].ids_SBL)
    masked_SBG = found[1].ids_SBL[:, :, 3:] == found[1].mask_id
    assert bool(masked_SBG[0].all()) and not bool(masked_SBG[-1].any())


def test_a_block_that_fails_is_dropped_all_the_same(folder: Path) -> None:
    hollow = load_model(folder, blocks_on_disk=True)
    exact = logits(hollow)
    site = next(iter(hollow.block_sites(hollow.trunk().blocks[1]).inputs.values()))

    def fail(_: nn.Module, __: object) -> None:
        raise RuntimeError("in the middle")

    handle = site.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        logits(hollow)
    assert all_on_meta(hollow)
    handle.remove()
    assert torch.equal(logits(hollow), exact)


def test_a_file_that_has_gone_is_named(folder: Path) -> None:
    hollow = load_model(folder, blocks_on_disk=True)
    name = next(n for n, p in hollow.named_parameters() if p.is_meta)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index[name]
    moved = folder / "elsewhere"
    shutil.move(file, moved)
    with pytest.raises(CheckpointError, match=f"{file.name}: .* cannot be read any more"):
        logits(hollow)
    file.write_bytes(moved.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{file.name}: .* cannot be read any more"):
        next(walk(hollow, partly_masked(hollow)))


def test_bad_checkpoints_and_arguments_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="give device_map or blocks_on_disk, not both"):
        load_model(folder, device_map="auto", blocks_on_disk=True)
    with pytest.raises(ConfigError, match=r"model\.dtype: got 'int8'"):
        load_model(folder, dtype="int8", blocks_on_disk=True)
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=f"{file.name}: truncated"):
        load_model(folder, blocks_on_disk=True)


def test_llada_with_a_padded_vocabulary(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1, "mlp_hidden_size": 48, "vocab_size": 190}
    model = LLaDAModelLM(LLaDAConfig(**sizes, embedding_size=256, max_sequence_length=32, mask_token_id=189))
    model.save_pretrained(tmp_path)
    found = logits(load_model(tmp_path, blocks_on_disk=True))
    assert found.shape[-1] == 256
    assert torch.equal(found, logits(load_model(tmp_path)))
