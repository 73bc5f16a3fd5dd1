"""llama.cpp against our forward pass: golden models through both, logits, generation, likelihood."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from starquant.diffusion import BatchSize, LikelihoodEstimator, MaskPredictor, ScoreRequest, generate
from starquant.errors import CheckpointError, ConfigError
from starquant.llama_cpp.blocks import block_bytes
from starquant.llama_cpp.engine import Engine
from starquant.llama_cpp.predictor import LlamaCppPredictor
from starquant.models import family_of
from starquant.models.base import MaskedDiffusionModel
from starquant.models.dream import DreamConfig, DreamModel
from starquant.numerics import PerGroup, QuantFormat, dequantize, fake_quantize, quantize
from starquant.quantized.install import install
from tests.support.llama import KINDS, bits_of_blocks, block_model, masked_ids, write
from tests.support.models import fresh

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

GOLDEN_KINDS = ("llada_mha", "llada_gqa", "dream_gqa")


def _engine(model: MaskedDiffusionModel, path: Path, kind: str = "F32") -> Engine:
    return Engine(write(model, path, kind), 64, threads=1)


@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_golden_models_give_the_same_logits_in_float32(kind: str, tmp_path: Path) -> None:
    model = fresh(kind).float()
    ids = masked_ids(model, 40)
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    theirs = _engine(model, tmp_path / "m.gguf").logits(ids)
    assert float((theirs - ours).abs().max()) < 1e-4 * float(ours.std())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_float16_file_are_within_its_rounding(kind: str, tmp_path: Path) -> None:
    model = block_model(kind)
    ids = masked_ids(model)
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    theirs = _engine(model, tmp_path / "m.gguf", "F16").logits(ids)
    assert 0 < float((theirs - ours).abs().max()) < 0.02 * float(ours.std())
    assert float((theirs.argmax(1) == ours.argmax(1)).float().mean()) > 0.95


@pytest.mark.parametrize("bits", ["q4_0", "q8_0"])
@pytest.mark.parametrize("kind", ["llada_mha", "llada_gqa", "dream_gqa", "dream_tied"])
def test_fake_quantization_is_llama_cpps_arithmetic(kind: str, bits: str, tmp_path: Path) -> None:
    """Up to the order of sums, which now and then turns a number that stands between two codes."""
    packed, fake, full = (block_model(kind) for _ in range(3))
    install(packed, bits_of_blocks(bits, kind), packed=True)
    install(fake, bits_of_blocks(bits, kind))
    ids = torch.stack([masked_ids(full, seed=seed) for seed in range(8)])
    with torch.no_grad():
        ours, exact = fake(ids).logits, full(ids).logits
    engine = _engine(packed, tmp_path / "m.gguf")
    theirs = torch.stack([engine.logits(row) for row in ids])
    off, lost = (theirs - ours).abs().amax((1, 2)), (ours - exact).abs().amax((1, 2))
    assert float(off.min()) < 1e-4
    assert float(off.square().mean()) < 0.1 * float(lost.square().mean())


def test_a_product_of_blocks_is_llama_cpps_own() -> None:
    """One row of Q4_0 codes times one of Q8_0, by the engine's own function, of which the forward pass is made."""
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-cpu.so"))
    library.ggml_cpu_init()
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 256, generator=generator), 3 * torch.randn(16, 256, generator=generator)
    q4_0 = QuantFormat(4, True, PerGroup(32), block="q4_0")
    q8_0 = QuantFormat(8, True, PerGroup(32), block="q8_0")
    codes = quantize(weight, q4_0)
    rows, fake = block_bytes(codes, "q4_0"), fake_quantize(x, q8_0)
    for row in range(16):
        stored, result = np.zeros(256 // 32 * 34, np.uint8), ctypes.c_float()
        source = np.ascontiguousarray(x[row].numpy())
        pointers: list[Any] = [a.ctypes.data_as(ctypes.c_void_p) for a in (source, stored, rows[row].copy())]
        library.quantize_row_q8_0(pointers[0], pointers[1], ctypes.c_int64(256))
        size = ctypes.c_size_t(0)
        library.ggml_vec_dot_q4_0_q8_0(256, ctypes.byref(result), size, pointers[2], size, pointers[1], size, 1)
        assert block_bytes(quantize(x[row : row + 1], q8_0), "q8_0").tobytes() == stored.tobytes()
        expected = float((dequantize(codes)[row].double() * fake[row].double()).sum())
        assert result.value == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_generation_over_llama_cpp_equals_ours_token_for_token(kind: str, tmp_path: Path) -> None:
    model = fresh(kind).float()
    predict = LlamaCppPredictor(_engine(model, tmp_path / "m.gguf"), model)
    sampler = family_of(model).sampler.of_length(12)
    prompts = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 3, 4, 11]])
    visible = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    ours = generate(model, prompts, sampler, attention_mask=visible)
    assert torch.equal(generate(predict, prompts, sampler, attention_mask=visible), ours)


@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_likelihood_with_guidance_is_ours(kind: str, tmp_path: Path) -> None:
    model = fresh(kind).float()
    requests = [ScoreRequest((5, 6, 7), (8, 9, 10)), ScoreRequest((3,), (4, 12))]
    estimator = LikelihoodEstimator(family_of(model).noise, 8, 0.5, BatchSize(4), 0)
    predict = LlamaCppPredictor(_engine(model, tmp_path / "m.gguf"), model)
    ours, theirs = (dict(estimator.scores(p, requests)) for p in (MaskPredictor(model), predict))
    assert theirs == pytest.approx(ours, rel=1e-4)


def test_files_that_are_cut_or_of_something_else_are_one_clear_error(tmp_path: Path) -> None:
    model = block_model("llada_mha")
    path = write(model, tmp_path / "m.gguf")
    cut, text = tmp_path / "cut.gguf", tmp_path / "text.gguf"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text.write_text("no model")
    for other in (cut, text, tmp_path / "missing.gguf"):
        with pytest.raises(CheckpointError, match=f"{other.name}: llama.cpp does not load it: "):
            Engine(other, 64, threads=1)
    larger = DreamModel(DreamConfig(vocab_size=300, hidden_size=96, intermediate_size=160, num_hidden_layers=1,
                                    num_attention_heads=6, num_key_value_heads=2, mask_token_id=199))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"m\.gguf: has 200 tokens, the checkpoint 300"):
        LlamaCppPredictor(Engine(path, 64, threads=1), larger)


def test_a_cache_and_a_sequence_that_is_too_long_are_refused(tmp_path: Path) -> None:
    model = block_model("llada_mha")
    predict = LlamaCppPredictor(_engine(model, tmp_path / "m.gguf"), model)
    where = torch.tensor([0]), torch.tensor([0])
    with pytest.raises(ConfigError, match=r"speed.kv_cache: .*allowed: none"):
        list(predict.chunks(masked_ids(model)[None], where, cache=model.new_cache()))
    with pytest.raises(ValueError, match="got 65 tokens, allowed: 1 to 64"):
        predict(torch.zeros(1, 65, dtype=torch.long), where)
