"""Corrections that cost nothing at run time: TAC folded into the dense transform behind it.

z M^T + d followed by P is z (M^T P) + d P: one dense map instead of two, the same function up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starquant.models.context import Context
from starquant.quantized.state_transforms import BlockAffine
from starquant.quantized.transforms import OrthogonalTransform


@dataclass(frozen=True)
class DenseAffine:
    """x A + b in float32; the linears behind it hold what undoes P."""

    matrix_DD: Tensor
    shift_D: Tensor

    def __call__(self, x_BLD: Tensor, context: Context | None = None) -> Tensor:
        """Return x A + b, [..., D]."""
        rows = x_BLD.float().flatten(0, -2)
        return torch.addmm(self.shift_D, rows, self.matrix_DD).view(x_BLD.shape).to(x_BLD.dtype)


def fold(correction: BlockAffine, exact: OrthogonalTransform) -> DenseAffine:
    """Return a correction of one condition and the transform behind it as one map, computed in float64."""
    p_DD = exact.matrix_DD.double()
    p_NGD = p_DD.unflatten(0, correction.shift_CNG.shape[1:])
    matrix_NGD = correction.matrix_CNGG[0].double().mT @ p_NGD
    shift_D = correction.shift_CNG[0].double().flatten() @ p_DD
    return DenseAffine(matrix_NGD.flatten(0, 1).float(), shift_D.float())
