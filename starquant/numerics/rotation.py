"""An orthogonal matrix R that acts on the last dimension: signs times Hadamard, or dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starquant.errors import ConfigError
from starquant.numerics.hadamard import apply_hadamard, random_orthogonal, random_signs


@dataclass(frozen=True)
class Rotation:
    """R = diag(signs) H with the normalised Hadamard matrix H, or a dense orthogonal `matrix`; one of them is given."""

    signs_D: Tensor | None = None
    matrix_DD: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Return x R, [..., D]."""
        if self.signs_D is not None:
            return apply_hadamard(x * self.signs_D.to(x))
        assert self.matrix_DD is not None
        return x @ self.matrix_DD.to(x)

    def inverse(self, x: Tensor) -> Tensor:
        """Return x R^T, [..., D]."""
        if self.signs_D is not None:
            return apply_hadamard(x, transpose=True) * self.signs_D.to(x)
        assert self.matrix_DD is not None
        return x @ self.matrix_DD.T.to(x)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what `from_tensors` needs."""
        if self.signs_D is not None:
            return {"rotation.signs": self.signs_D}
        assert self.matrix_DD is not None
        return {"rotation.matrix": self.matrix_DD}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Rotation | None:
        """Rebuild a rotation; None when the tensors hold none."""
        signs, matrix = tensors.get("rotation.signs"), tensors.get("rotation.matrix")
        return None if signs is None and matrix is None else cls(signs, matrix)


def random_rotation(kind: str, width: int, seed: int) -> Rotation:
    """Return a random rotation: "hadamard" (random signs) or "orthogonal" (Haar).

    Raises:
        ConfigError: unknown kind.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "hadamard":
        return Rotation(signs_D=random_signs(width, generator))
    if kind == "orthogonal":
        return Rotation(matrix_DD=random_orthogonal(width, generator))
    raise ConfigError(f"method.residual_rotation: got '{kind}', allowed: hadamard, orthogonal, none")
