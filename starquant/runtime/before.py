"""What of a site's transform the quantizing kernel takes over, and what is left to do in front of it."""

from __future__ import annotations

from torch import Tensor, nn

from starquant.kernels import Before, Gate
from starquant.models.layers import Context
from starquant.runtime.folding import folded
from starquant.runtime.token_state import BlockAffine, SiteTransform, StateGate
from starquant.runtime.transforms import HadamardTransform, HeadsHadamard, KroneckerTransform

_KRONECKER = (HadamardTransform, HeadsHadamard, KroneckerTransform)


def split(transform: nn.Module | None, x_BLD: Tensor, context: Context) -> tuple[Tensor, Before]:
    """Do what no kernel does, and return the result with what is left: TAC, a Kronecker transform, a gate, in order."""
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
    if not isinstance(gate, StateGate):
        return x_BLD if gate is None else gate(x_BLD, context), Before(affine, kronecker)
    return x_BLD, Before(affine, kronecker, Gate(context.masked_BL, gate.masked, gate.unmasked))


def _taken(exact: nn.Module | None) -> bool:
    return exact is None or isinstance(exact, _KRONECKER)
