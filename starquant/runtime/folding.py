"""Corrections that cost nothing at run time: TAC folded into the dense transform behind it.

z M^T + d followed by P is z (M^T P) + d P: one dense map instead of two, the same function up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.models.base import MaskedDiffusionModel
from starquant.models.layers import Context
from starquant.runtime.keeping import Float32Buffers
from starquant.runtime.token_state import BlockAffine, SiteTransform
from starquant.runtime.transforms import OrthogonalTransform


class DenseAffine(Float32Buffers):
    """x A + b in float32; the linears behind it hold what undoes P."""

    def __init__(self, matrix_DD: Tensor, shift_D: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix_DD", matrix_DD)
        self.register_buffer("shift_D", shift_D)

    def forward(self, x_BLD: Tensor, context: Context | None = None) -> Tensor:
        """Return x A + b, [..., D]."""
        rows = x_BLD.float().flatten(0, -2)
        return torch.addmm(self.shift_D, rows, self.matrix_DD).view(x_BLD.shape).to(x_BLD.dtype)

    def __str__(self) -> str:
        return f"affine {len(self.matrix_DD)}"


@torch.no_grad()
def fold_corrections(model: MaskedDiffusionModel) -> int:
    """Fold every unconditional correction that a dense transform follows, in place; returns how many."""
    count = 0
    for module in model.modules():
        if not isinstance(module, SiteTransform):
            continue
        correction, exact = module.correction, module.exact
        if (
            isinstance(correction, BlockAffine)
            and isinstance(exact, OrthogonalTransform)
            and len(correction.shift_CNG) == 1
        ):
            blocks_NGG, p_DD = correction.matrix_CNGG[0].double(), exact.matrix_DD.double()
            before = torch.block_diag(*(block.T for block in blocks_NGG))
            shift = correction.shift_CNG[0].double().flatten() @ p_DD
            module.correction, module.exact = None, DenseAffine((before @ p_DD).float(), shift.float())
            count += 1
    return count
