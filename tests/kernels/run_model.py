"""A whole packed model through the kernels, against the reference path; run by test_kernels.py."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from packed_models import VARIANTS, described

from starquant.kernels import dispatch
from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.models.sdar import SDARConfig, SDARForCausalLM
from starquant.numerics import gate_channels
from starquant.packed.description import rebuild, use_integers
from tests.support import interpreter as _quicker  # noqa: F401

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"


def model(family: str, variant: str, dtype: torch.dtype, layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        if family == "llada":
            made = LLaDAModelLM(LLaDAConfig(64, 4, None, layers, 96, vocab_size=100, mask_token_id=99)).to(dtype)
        elif family == "sdar":  # queries and keys are normalised
            sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers}
            more = {"head_dim": 16, "intermediate_size": 96, "vocab_size": 100, "mask_token_id": 99, "eos_token_id": 98}
            made = SDARForCausalLM(SDARConfig(**sizes, **more)).to(dtype)
        else:
            sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers}
            config = DreamConfig(**sizes, intermediate_size=96, vocab_size=100, mask_token_id=99, pad_token_id=98)
            made = DreamModel(config).to(dtype)
        rebuild(made, described(made, VARIANTS[variant], 8))
        made = made.to_empty(device=DEVICE)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        elif name.endswith("scale"):
            tensor.fill_(0.02)
        elif name.endswith("zero"):
            tensor.random_(0, 16)
        else:
            tensor.data.normal_(std=0.3)
    for module in made.modules():
        if hasattr(module, "keep_SD"):
            module.keep_SD.copy_(gate_channels(module.width, module.d_m, module.d_u))
        if hasattr(module, "state_clip") and module.state_clip is not None:
            module.state_clip.copy_(torch.tensor([0.9, 0.8]))
    return made.eval()


def check(family: str, variant: str, dtype: torch.dtype, layers: int = 2) -> None:
    made = model(family, variant, dtype, layers)
    sites = use_integers(made, join="always")
    ids = torch.randint(0, 90, (2, 7), device=DEVICE)
    ids[:, 3:5] = 99
    with torch.inference_mode():
        found = made(input_ids=ids).logits.float()
        with mock.patch.object(dispatch, "HAS_TRITON", False):
            expected = made(input_ids=ids).logits.float()
            exact = made.float()(input_ids=ids).logits
    apart, rounded = (float((logits - expected).norm() / expected.norm()) for logits in (found, exact))
    print(f"{family} {variant} {dtype}: {sites} sites, {apart:.1e} apart; from float32 {rounded:.1e}")
    limit = 1e-4 if dtype == torch.float32 else 0.02 if VARIANTS[variant].transform == "none" else 0.05
    if DEVICE != "cpu" and dtype != torch.float32:  # sums in another order: about as far as 16 bits are from 32
        limit = max(limit, 2 * rounded)
    assert torch.isfinite(found).all() and apart < limit, apart
    assert sites == (4 * layers if VARIANTS[variant].inputs < 16 else 0)


if __name__ == "__main__":
    if DEVICE != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"error: {DEVICE}: there is no GPU here")
    few = 2 if DEVICE != "cpu" else 1  # in the interpreter, what passes from one block to the next three models show
    check("llada", "w4a4", torch.float32)
    for variant in ("w4a4-shared", "w4a4-quarot", "w4a4-plain", "w4a4-asym-in", "w8a8"):
        check("llada", variant, torch.float32, few)
    check("dream", "w4a4", torch.float32, few)
    check("dream", "w4a4-plain", torch.float16)
    check("dream", "w8a8", torch.float16, few)
    check("dream", "w4a4-asym", torch.float32, few)
    check("llada", "w4a16", torch.float16, few)
    check("llada", "w4a4-no-tac", torch.float16, few)
    check("sdar", "w4a4-plain", torch.float16)
    print("all near")
