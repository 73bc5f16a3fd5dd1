"""Corrections that cost nothing at run time: TAC folded into the dense transform behind it.

z M^T + d followed by P is z (M^T P) + d P: one dense map instead of two, the same function up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starquant.quantized.state_transforms import BlockAffine, SiteTransform
from starquant.quantized.transforms import OrthogonalTransform


@dataclass(frozen=True)
class DenseAffine:
    """x A + b in float32; the linears behind it hold what undoes P."""

    matrix_DD: Tensor
    shift_D: Tensor

    def __call__(self, x_BLD: Tensor) -> Tensor:
        """Return x A + b, [..., D]."""
        rows = x_BLD.float().flatten(0, -2)
        return torch.addmm(self.shift_D, rows, self.matrix_DD).view(x_BLD.shape).to(x_BLD.dtype)


@torch.no_grad()
def folded(transform: SiteTransform) -> DenseAffine | None:
    """Return correction and exact transform as one map; None where they do not fold.

    It is made once and kept beside the transform, whose own tensors stay what they are.
    """
    correction, exact = transform.correction, transform.exact
    if (
        not isinstance(correction, BlockAffine)
        or not isinstance(exact, OrthogonalTransform)
        or len(correction.shift_CNG) != 1
    ):
        return None
    kept: DenseAffine | None = transform.folded
    if kept is None or kept.matrix_DD.device != exact.matrix_DD.device:
        with torch.inference_mode(False):
            blocks_NGG, p_DD = correction.matrix_CNGG[0].double(), exact.matrix_DD.double()
            before = torch.block_diag(*(block.T for block in blocks_NGG))
            shift = correction.shift_CNG[0].double().flatten() @ p_DD
            kept = DenseAffine((before @ p_DD).float(), shift.float())
        transform.folded = kept
    return kept
