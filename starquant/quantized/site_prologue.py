"""What of a site's transform the quantizing kernel runs, and what runs in front of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from starquant.kernels import Affine, Kronecker, Norm, Prologue, TokenStates
from starquant.models.context import Context
from starquant.models.layers import Front, RMSNorm, in_front
from starquant.quantized.folding import DenseAffine, fold
from starquant.quantized.state_transforms import BlockAffine, SiteTransform, StateGate
from starquant.quantized.transforms import HadamardTransform, HeadsHadamard, KroneckerTransform, OrthogonalTransform

_KRONECKER = (HadamardTransform, HeadsHadamard, KroneckerTransform)  # and what derives from them


@dataclass(frozen=True)
class SitePrologue:
    """A site's transform as its integer path runs it, made from the transform's tensors where they are.

    Attributes:
        steps: what no kernel does, in this order.
        affine: TAC, in the kernel; None for nothing.
        kronecker: an exact transform, in the kernel; None for nothing.
        d_m: channels of masked tokens only, in the kernel.
        d_u: channels of unmasked tokens only, in the kernel.
    """

    steps: tuple[Callable[[Tensor, Context], Tensor], ...] = ()
    affine: Affine | None = None
    kronecker: Kronecker | None = None
    d_m: int = 0
    d_u: int = 0

    @classmethod
    @torch.no_grad()
    def of(cls, transform: nn.Module | None, device: torch.device) -> SitePrologue:
        """Return the prologue of a transform on a device; to be made again when its tensors move or change."""
        if not isinstance(transform, SiteTransform):
            transform = SiteTransform(transform)
        correction: nn.Module | DenseAffine | None = transform.correction
        exact, gate = transform.exact, transform.gate
        affine = kronecker = None
        with torch.inference_mode(False):  # what is made here must serve other passes too
            if isinstance(correction, BlockAffine) and len(correction.shift_CNG) == 1:
                if exact is None or isinstance(exact, _KRONECKER):
                    affine, correction = correction.affine(), None
                elif isinstance(exact, OrthogonalTransform):
                    correction, exact = fold(correction, exact), None
            if isinstance(exact, _KRONECKER):
                kronecker, exact = exact.kronecker(device), None
        d_m, d_u = (gate.d_m, gate.d_u) if isinstance(gate, StateGate) else (0, 0)
        in_front = (correction, exact, None if isinstance(gate, StateGate) else gate)
        steps = tuple(step for step in in_front if step is not None)
        return cls(steps, affine, kronecker, d_m, d_u)

    def take(self, x_BLD: Tensor, front: Front) -> tuple[Tensor, Tensor | Norm | None]:
        """Return what `split` takes, and SwiGLU's gate or the norm in front of it, if the kernel runs that as well."""
        if not self.steps and isinstance(front, Tensor):
            return x_BLD, front
        if not self.steps and isinstance(front, RMSNorm) and front.weight.dtype == x_BLD.dtype:
            return x_BLD, Norm(front.weight, front.eps)
        return in_front(x_BLD, front), None

    def split(self, x_BLD: Tensor, context: Context, clip_S: Tensor | None) -> tuple[Tensor, Prologue]:
        """Run what no kernel does; return the result with what is left to the kernel."""
        for step in self.steps:
            x_BLD = step(x_BLD, context)
        if self.d_m + self.d_u == 0 and clip_S is None:
            return x_BLD, Prologue(self.affine, self.kronecker)
        return x_BLD, Prologue(self.affine, self.kronecker, TokenStates(context.state_BL, self.d_m, self.d_u, clip_S))
