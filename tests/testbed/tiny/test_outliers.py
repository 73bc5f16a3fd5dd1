"""Stronger outlier channels change activations, not the function."""

from __future__ import annotations

import pytest
import torch

from starquant.models import load_model
from starquant.testbed.tiny.outliers import strengthen
from tests.support.paths import GOLDEN


@pytest.mark.parametrize("architecture", ["llada_mha", "dream_gqa"])
def test_the_function_is_unchanged_and_the_channels_stand_out(architecture: str) -> None:
    model, reference = load_model(GOLDEN / architecture), load_model(GOLDEN / architecture)
    strengthen(model, 16.0, 1)
    ids = torch.randint(0, model.mask_token_id, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, ::3] = model.mask_token_id
    seen: dict[str, list[torch.Tensor]] = {"before": [], "after": []}
    for key, one in (("before", reference), ("after", model)):
        sites = one.block_sites(one.trunk().blocks[0])
        for site in ("out_input", "down_input"):
            module = next(m for s, m in sites.inputs.items() if s.value == site)
            module.register_forward_hook(lambda _m, _i, out, key=key: seen[key].append(out.abs().amax((0, 1))))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-5)
    for before, after in zip(seen["before"], seen["after"], strict=True):
        torch.testing.assert_close(after[0], 16 * before[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after[1], before[1], rtol=1e-4, atol=1e-6)
