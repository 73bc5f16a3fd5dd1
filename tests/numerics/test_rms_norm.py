"""The norm in one call, where there is one, against its formula."""

from __future__ import annotations

import pytest
import torch

from starquant.numerics import rms_norm


@pytest.mark.parametrize("shape", [(3, 128), (2, 5, 576), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_its_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gain_D = (10 * torch.randn(size, generator=generator) for size in (shape, shape[-1:]))
    x[..., 0] *= 100  # a massive activation
    x, gain_D = x.to(dtype), gain_D.to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(rms_norm(x, gain_D, 1e-5).double(), gain_D.double() * exact, rtol=tolerance, atol=0)
