"""A run whose blocks stay on disk: the same numbers and files, one block at a time, gone on with, judged by room."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from starquant.config.bits import ActivationSpec, BitsSpec, WeightSpec
from starquant.errors import CheckpointError, ConfigError
from starquant.models import blocks_on_disk, load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.models.blocks_on_disk import ChangedBlock, hollow_model
from starquant.models.loading import validate_checkpoint
from starquant.models.roles import Role
from starquant.quantized.install import install
from starquant.quantized.rewriting import hadamard_input
from starquant.runs import placement
from starquant.runs.execute import execute
from starquant.runs.inputs import pin
from starquant.runs.placement import on_disk
from starquant.store.scratch import Scratch
from tests.support.methods import FOUR, fitted_once, method_named
from tests.support.models import fresh, logits
from tests.support.specs import spec

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
METHODS = ("rtn", "smoothquant", "quarot", "dllmquant_plus_plus", "star_quant", "star_quant_plus", "freeact")
TASKS = ("tasks.names=[testbed_facts]", "tasks.limit=8", "fidelity=none")


#: Each method on one of two families, in turn; on the other among the slow ones.
IN_TURN = [
    pytest.param(name, family, marks=() if (i + k) % 2 == 0 else pytest.mark.slow)
    for i, name in enumerate(METHODS)
    for k, family in enumerate(("llada_gqa", "dream_gqa"))
]


@pytest.mark.parametrize(("name", "architecture"), IN_TURN)
def test_what_is_applied_on_disk_computes_what_it_does_in_memory(name: str, architecture: str, tmp_path: Path) -> None:
    method, bits = method_named(name, *FOUR, "bits.embedding=8", "bits.head=8")
    fitted = fitted_once(name, architecture)
    resident = fresh(architecture)
    resident.save_pretrained(tmp_path / "model")
    checkpoint, family = validate_checkpoint(tmp_path / "model")
    hollow = hollow_model(checkpoint, family.model, resident.dtype, torch.device("cpu"), tmp_path / "changed")
    ids = IDS.where(IDS % 3 > 0, resident.mask_token_id)
    ours, theirs = method.apply(hollow, fitted, bits), method.apply(resident, fitted, bits)
    assert ours == theirs
    assert torch.equal(logits(hollow, ids), logits(resident, ids))
    assert all(p.is_meta for block in hollow.trunk().blocks for p in (*block.parameters(), *block.buffers()))
    assert len(list((tmp_path / "changed").iterdir())) == len(hollow.trunk().blocks)


@pytest.mark.parametrize("packed", [False, True])
def test_weights_of_one_block_are_gone_when_the_next_is_read(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewritten and rounded, or packed: nothing that holds a block's weights outlives it."""
    resident, plain = fresh("llada_gqa"), blocks_on_disk.resident_block
    resident.save_pretrained(tmp_path / "model")
    checkpoint, family = validate_checkpoint(tmp_path / "model")
    hollow = hollow_model(checkpoint, family.model, resident.dtype, torch.device("cpu"), tmp_path / "changed")
    weights: list[weakref.ref[Tensor]] = []

    def read(model: MaskedDiffusionModel, index: int) -> nn.Module:
        assert [ref for ref in weights if ref() is not None] == []
        block = plain(model, index)
        weights.extend(weakref.ref(linear.weight) for linear in model.block_sites(block).linears.values())
        return block

    monkeypatch.setattr(blocks_on_disk, "resident_block", read)
    bits = BitsSpec(name="test", weights=WeightSpec(bits=4), activations=ActivationSpec(bits=4))
    install(hollow, bits, packed=packed, rewrite=lambda sites, _: hadamard_input(sites.linears[Role.DOWN]))
    assert len(weights) == 7 * len(hollow.trunk().blocks) > 7


def test_blocks_that_are_only_read_are_not_changed(tmp_path: Path) -> None:
    fresh("llada_gqa").save_pretrained(tmp_path)
    method, bits = method_named("rtn", "bits=w4a4")
    with pytest.raises(ConfigError, match="blocks_on_disk: these blocks are only read"):
        method.apply(load_model(tmp_path, blocks_on_disk=True), fitted_once("rtn", "llada_gqa"), bits)
    method_named("none")[0].apply(load_model(tmp_path, blocks_on_disk=True), fitted_once("rtn", "llada_gqa"), bits)


def test_a_file_of_a_changed_block_that_has_gone_is_named(tmp_path: Path) -> None:
    block = nn.Linear(4, 4)
    with pytest.raises(CheckpointError, match=r"part.safetensors: cannot be written"):
        (tmp_path / "file").write_text("")
        ChangedBlock.write(block, tmp_path / "file" / "part.safetensors", torch.device("cpu"))
    part = ChangedBlock.write(block, tmp_path / "part.safetensors", torch.device("cpu"), {"a": {"kind": "site"}})
    assert part.said() == {"a": {"kind": "site"}}
    part.path.write_bytes(part.path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"part.safetensors: cannot be read any more"):
        part.fill(block)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def run(results: Path, *overrides: str) -> Path:
    few = ("method.transform.steps=3", "calibration.source.segments=16")
    words = ("method=star_quant", *few, *TASKS, f"paths.results={results}")
    return execute(spec(*words, f"export.dir={results / 'packed'}", *overrides)).path


def test_a_run_scores_and_exports_the_same(tmp_path: Path) -> None:
    for where in ("memory", "disk"):
        run(tmp_path / where, f"runtime.blocks={where}")
    one, other = (next((tmp_path / w / "records").glob("*star_quant*.items")) for w in ("memory", "disk"))
    assert [p.read_text() for p in sorted(one.iterdir())] == [p.read_text() for p in sorted(other.iterdir())]
    assert contents(tmp_path / "memory" / "packed") == contents(tmp_path / "disk" / "packed")
    assert not list((tmp_path / "disk" / "unfinished").iterdir())


def test_an_interrupted_export_goes_on_from_its_last_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """But for a block that was edited in between."""
    written: list[str] = []
    real = ChangedBlock.write

    def write(block: nn.Module, path: Path, *rest: object) -> ChangedBlock:
        if "export-" in str(path):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(path.name)
        return real(block, path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ChangedBlock, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", "runtime.blocks=disk")
    assert not (tmp_path / "cut" / "packed").exists()
    (part,) = (tmp_path / "cut" / "unfinished").glob("export-*/*/block_000.safetensors")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    written.clear()
    monkeypatch.setattr(ChangedBlock, "write", staticmethod(lambda b, p, *r: written.append(p.name) or real(b, p, *r)))
    run(tmp_path / "cut", "runtime.blocks=disk")
    assert written == ["block_000.safetensors", "block_002.safetensors", "block_003.safetensors"]
    assert f"{part}: is not what was written; set aside as block_000.safetensors.damaged" in caplog.text
    run(tmp_path / "whole", "runtime.blocks=memory")
    assert contents(tmp_path / "cut" / "packed") == contents(tmp_path / "whole" / "packed")


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    held = Scratch(tmp_path)
    (tmp_path / "unfinished" / "blocks-0123").mkdir()
    other = Scratch(tmp_path)
    assert sorted(p.name for p in (tmp_path / "unfinished").iterdir()) == sorted([held.folder.name, other.folder.name])
    for scratch in (held, other):
        scratch.remove()
    assert not list((tmp_path / "unfinished").iterdir())


class Room(NamedTuple):
    free: int


def place(monkeypatch: pytest.MonkeyPatch, memory: int, disk: int, *overrides: str) -> bool:
    monkeypatch.setattr(placement, "free_bytes", lambda device: memory)
    monkeypatch.setattr(placement.shutil, "disk_usage", lambda path: Room(disk))
    inputs = pin(spec("method=rtn", *overrides))
    return on_disk(inputs.spec, inputs.checkpoint, "cpu")


@pytest.mark.parametrize(
    ("blocks", "memory", "wanted"), [("auto", 10**9, False), ("auto", 10**6, True), ("disk", 10**9, True)]
)
def test_auto_goes_by_memory(blocks: str, memory: int, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch, memory, 10**9, f"runtime.blocks={blocks}") is wanted


@pytest.mark.parametrize(
    ("words", "memory", "disk", "message"),
    [
        ("runtime.blocks=memory", 10**6, 10**9, r"runtime\.blocks: got memory, which needs 0\.0 GB on cpu, where 0\.0"),
        ("runtime.blocks=disk", 10**9, 10**3, r"runtime\.blocks: got disk, and quantized blocks on disk need 0\.0 GB"),
        ("runtime.blocks=auto", 10**6, 10**3, r"runtime\.blocks: got auto, and quantized blocks on disk need 0\.0 GB"),
    ],
)
def test_what_does_not_fit_is_refused(
    words: str, memory: int, disk: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message):
        place(monkeypatch, memory, disk, words)


def test_full_precision_needs_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch, 10**6, 10**3, "method=none")


def test_a_packed_checkpoint_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    packed = (f"model.path={tmp_path / 'packed'}", "model.seed=null", "method=packed")
    assert not place(monkeypatch, 10**3, 10**3, *packed)
    with pytest.raises(ConfigError, match=r"runtime\.blocks: got disk, but a packed checkpoint"):
        place(monkeypatch, 10**3, 10**3, *packed, "runtime.blocks=disk")
