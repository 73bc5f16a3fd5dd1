"""What of a site's transform the quantizing kernel takes over, and what is left to do in front of it."""

from __future__ import annotations

from torch import Tensor, nn

from starquant.kernels import Before, TokenStates
from starquant.models.context import Context
from starquant.quantized.folding import folded
from starquant.quantized.state_transforms import BlockAffine, SiteTransform, StateGate
from starquant.quantized.transforms import HadamardTransform, HeadsHadamard, KroneckerTransform

_KRONECKER = (HadamardTransform, HeadsHadamard, KroneckerTransform)


def split(transform: nn.Module | None, clip_S: Tensor | None, x_BLD: Tensor, context: Context) -> tuple[Tensor, Before]:
    """Do what no kernel does; return the result with what is left: TAC, a Kronecker transform, gate and clip ratios."""
    if not isinstance(transform, SiteTransform):
        transform = SiteTransform(transform)
    correction, exact, gate = transform.correction, transform.exact, transform.gate
    affine = kronecker = None
    if isinstance(correction, BlockAffine) and len(correction.shift_CNG) == 1 and _taken(exact):
        affine = correction.affine()
    elif (both := folded(transform)) is not None:
        x_BLD, exact = both(x_BLD), None
    elif correction is not None:
        x_BLD = correction(x_BLD, context)
    if isinstance(exact, _KRONECKER):
        kronecker = exact.kronecker(x_BLD.device)
    elif exact is not None:
        x_BLD = exact(x_BLD, context)
    gated = isinstance(gate, StateGate)
    if gate is not None and not gated:
        x_BLD = gate(x_BLD, context)
    if not gated and clip_S is None:
        return x_BLD, Before(affine, kronecker)
    widths = (gate.masked, gate.unmasked) if isinstance(gate, StateGate) else (0, 0)
    return x_BLD, Before(affine, kronecker, TokenStates(context.masked_BL, *widths, clip_S))


def _taken(exact: nn.Module | None) -> bool:
    return exact is None or isinstance(exact, _KRONECKER)
