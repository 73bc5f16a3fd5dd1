"""Forward time of the fake-quantized (W4A4) against the full-precision model, alternating in one process."""

from __future__ import annotations

import argparse
import copy

import torch
from measure import alternate, machine

from starquant.config.bits import ActivationSpec, BitsSpec, WeightSpec
from starquant.models import load_model
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.quantized.install import install
from starquant.testbed.tiny.shipped import weights_folder

W4A4 = BitsSpec(name="w4a4", weights=WeightSpec(bits=4), activations=ActivationSpec(bits=4))


def wide() -> LLaDAModelLM:
    """LLaDA's proportions at d = 1024: 4 blocks, feed-forward of 3 d."""
    sizes = {"d_model": 1024, "n_heads": 16, "n_layers": 4, "mlp_hidden_size": 3072, "vocab_size": 1024}
    return LLaDAModelLM(LLaDAConfig(**sizes, mask_token_id=1)).eval()


def compare(name: str, model: torch.nn.Module, rows: int, length: int, repeats: int) -> None:
    """Print full-precision and fake-quantized milliseconds and their ratio."""
    ids = torch.randint(3, 300, (rows, length))
    quantized = copy.deepcopy(model)
    install(quantized, W4A4)

    def forward(which: torch.nn.Module) -> None:
        with torch.inference_mode():
            which(ids)

    medians = alternate({"full": lambda: forward(model), "fake": lambda: forward(quantized)}, repeats, warmup=3)
    full, fake = medians["full"] * 1e3, medians["fake"] * 1e3
    print(
        f"{name:10s} {rows:3d} x {length:3d} tokens: full {full:8.2f} ms, fake W4A4 {fake:8.2f} ms, {fake / full:.2f}x"
    )


def main() -> None:
    """Print the ratio at d = 1024 and on the embedded model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    compare("d = 1024", wide(), 1, 512, arguments.repeats)
    tiny = load_model(weights_folder(0))
    for rows in (1, 32):
        compare("tiny", tiny, rows, 32, arguments.repeats * 10)


if __name__ == "__main__":
    main()
