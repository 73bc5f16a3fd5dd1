"""Cut rows against plain operations and their own derivatives."""

from __future__ import annotations

import torch

from starquant.numerics import cut_rows


def test_values_and_gradients_are_those_of_plain_operations() -> None:
    generator = torch.Generator().manual_seed(0)
    x_OI, gain_OI = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)
    ratio_O2 = 0.3 + 0.6 * torch.rand(5, 2, generator=generator, dtype=torch.float64)
    found = []
    for cut in (cut_rows, lambda x, r: x.clamp(x.amin(1, True) * r[:, 1:], x.amax(1, True) * r[:, :1])):
        x, ratio = x_OI.clone().requires_grad_(), ratio_O2.clone().requires_grad_()
        out = cut(x, ratio)
        found.append((out.detach(), *torch.autograd.grad((out * gain_OI).sum(), (x, ratio))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert bool((found[0][0] != x_OI).any(1).all())
