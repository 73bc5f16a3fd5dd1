"""The real checkpoint, where `make smol` has built it: reference answers made by other code from the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from starquant.diffusion import generate
from starquant.diffusion.samplers import DreamSampler
from starquant.models import load_model, load_tokenizer
from starquant.models.base import MaskedDiffusionModel
from starquant.testbed.smol.cache import checkpoint_folder

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
FOLDER = checkpoint_folder(0)
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="smol is not built: make smol")


@pytest.fixture(scope="module")
def model() -> MaskedDiffusionModel:
    return load_model(FOLDER, dtype="float32")


LONG = ("sums", "programs")  # as the others are made, of more steps


@pytest.mark.parametrize(
    "golden",
    [
        pytest.param(golden, id=golden["task"], marks=[pytest.mark.slow] if golden["task"] in LONG else [])
        for golden in GOLDEN
    ],
)
def test_answer_and_logits(model: MaskedDiffusionModel, golden: dict[str, Any]) -> None:
    prompt, length = golden["prompt_ids"], golden["max_new_tokens"]
    tokenizer = load_tokenizer(FOLDER)
    assert tokenizer(golden["prompt"], add_special_tokens=False)["input_ids"] == prompt
    sampler = DreamSampler(max_new_tokens=length, steps=golden["steps"], alg=golden["alg"], temperature=0.0)
    answer = generate(model, torch.tensor([prompt]), sampler)[0, len(prompt) :].tolist()
    assert answer == golden["output_ids"]
    ids = torch.tensor([prompt + [model.mask_token_id] * length])
    # The hidden state in front of a position predicts it.
    top = model(ids).logits[0, len(prompt) - 1].topk(3)
    assert top.indices.tolist() == golden["first_position_top3_ids"]
    torch.testing.assert_close(top.values, torch.tensor(golden["first_position_top3_logits"]), rtol=0, atol=2e-3)
