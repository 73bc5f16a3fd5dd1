"""Weights kept as integer codes, 4-bit ones two a byte.

A row's byte j holds code j in its low half and code j + in/2 in its high half, so that a kernel multiplies both
halves of a tile without interleaving. Codes are stored from 0; the grid's smallest code is added when they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.errors import CheckpointError
from starquant.kernels import IntegerTokens, integer_linear, mixed_linear, uses_triton, value_linear, weight_offsets
from starquant.kernels.packing import pack, unpack
from starquant.kernels.row_chunks import read_values
from starquant.models.buffers import Float32Buffers
from starquant.models.validation import LARGEST
from starquant.numerics import PerChannel, PerGroup, QuantFormat, Quantized, dequantize
from starquant.numerics.chunks import row_slices


class Packed(Float32Buffers):
    """Codes [O, I / 2] or [O, I], scales [O, groups], and zero points where asymmetric.

    Args:
        rows: O, channels or words.
        columns: I, numbers of a row.
        weight_format: grid of the weight.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, rows: int, columns: int, weight_format: QuantFormat) -> None:
        super().__init__()
        self.rows, self.columns, self.weight_format = rows, columns, weight_format
        granularity = weight_format.granularity
        groups = columns // granularity.size if isinstance(granularity, PerGroup) else 1
        self.register_buffer("codes", torch.empty(rows, columns // 2 if self.halved else columns, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(rows, groups, dtype=torch.float32))
        self.register_buffer(
            "zero", None if weight_format.symmetric else torch.empty(rows, groups, dtype=torch.float32)
        )

    @property
    def halved(self) -> bool:
        """Whether two codes share a byte."""
        return self.weight_format.bits <= 4

    def reserve(self, device: torch.device) -> None:
        """Take memory for the codes, whose rows come later (`keep`)."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, torch.empty_like(buffer, device=device))

    def keep(self, quantized: Quantized, rows: slice = slice(None)) -> None:
        """Take the codes of some rows of a weight [O, I]."""
        scale = self.scale[rows]
        codes = (quantized.codes - quantized.qmin).reshape(len(scale), self.columns).to(torch.uint8)
        self.codes[rows] = pack(codes) if self.halved else codes
        scale.copy_(quantized.scale.reshape(len(scale), -1))
        if self.zero is not None and quantized.zero is not None:
            self.zero[rows] = quantized.zero.reshape(len(scale), -1).to(self.zero)

    def quantized(self, rows: Tensor | None = None) -> Quantized:
        """Return the codes as they were solved; of these rows, or of all."""
        codes, scale, zero = (t if rows is None or t is None else t[rows] for t in (self.codes, self.scale, self.zero))
        assert codes is not None and scale is not None
        codes = (unpack(codes) if self.halved else codes).to(torch.int16) + self.weight_format.qmin
        shape = codes.shape
        if isinstance(self.weight_format.granularity, PerGroup):
            codes = codes.unflatten(-1, (scale.shape[-1], -1))
            scale, zero = scale[..., None], None if zero is None else zero[..., None]
        return Quantized(codes, scale, zero, shape, self.weight_format.qmin)

    def validate(self, name: str) -> None:
        """Judge what was read.

        Raises:
            CheckpointError: codes that are not on the grid or all the same, scales that are not positive or larger than
                any weight's.
        """
        parts = (self.codes[rows] for rows in row_slices(self.codes))
        largest = max(int((unpack(codes) if self.halved else codes).max()) for codes in parts)
        top = (1 << self.weight_format.bits) - 1
        if self.codes.dtype != torch.uint8 or largest > top:
            raise CheckpointError(f"{name}.codes: got {self.codes.dtype} up to {largest}, allowed: uint8 up to {top}")
        if self.codes.numel() > 1 and bool((self.codes == self.codes.flatten()[0]).all()):
            raise CheckpointError(f"{name}.codes: got one code only, {int(self.codes.flatten()[0])}")
        if not bool((self.scale > 0).all()) or not bool(torch.isfinite(self.scale).all()):
            raise CheckpointError(f"{name}.scale: got values that are not positive numbers")
        if (reach := top * float(self.scale.max())) > LARGEST:
            raise CheckpointError(f"{name}.scale: its weights reach {reach:.3g}; allowed: at most {LARGEST:g}")
        zero = self.zero
        if zero is not None and not bool(((zero == zero.round()) & (zero >= 0) & (zero <= top)).all()):
            raise CheckpointError(f"{name}.zero: got values that are no codes, allowed: whole numbers, 0 to {top}")

    def extra_repr(self) -> str:
        """Show shape and bits."""
        return f"{self.columns}, {self.rows}, {self.weight_format.bits} bits"


class PackedEmbedding(Packed):
    """An embedding whose rows are codes; a row is turned to numbers when it is looked up.

    Args:
        words: rows.
        width: of a row.
        weight_format: one scale a row.
        dtype: of what is looked up; follows the model when it is cast.
    """

    def __init__(self, words: int, width: int, weight_format: QuantFormat, dtype: torch.dtype) -> None:
        super().__init__(words, width, weight_format)
        self.dtype = dtype

    @property
    def num_embeddings(self) -> int:
        """Rows."""
        return self.rows

    @property
    def embedding_dim(self) -> int:
        """Width."""
        return self.columns

    @classmethod
    def like(cls, embedding: nn.Embedding, weight_format: QuantFormat) -> PackedEmbedding:
        """Return one of an embedding's shape, on its device, that waits for its codes (`keep`)."""
        with torch.device("meta"):
            new = cls(embedding.num_embeddings, embedding.embedding_dim, weight_format, embedding.weight.dtype)
        new.reserve(embedding.weight.device)
        return new.train(embedding.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids, [..., width]."""
        if ids.device.type != "cpu":
            return dequantize(self.quantized(ids), self.dtype)
        ids_N = ids.flatten()
        values_ND = torch.empty(len(ids_N), self.columns, dtype=self.dtype)
        zero = None if self.zero is None else self.zero[ids_N]
        read_values(self.codes[ids_N], self.scale[ids_N], zero, self.weight_format.bits, values_ND)
        return values_ND.view(*ids.shape, self.columns)


class PackedLinear(Packed):
    """A linear whose weight is packed.

    It reads quantized values, as a fake-quantized linear does and with its numbers, or integer tokens (`kernels`).

    Args:
        in_features: inputs.
        out_features: outputs.
        weight_format: grid of the weight.
        bias: dtype of the bias, None for none.

    Attributes:
        offsets: zero points and sums of the rows (`kernels.offsets`), made by `prepare_offsets`; None where no product
            needs them.
        inputs_at_once: so many at least, where there is a choice (`diffusion.predictor`): a CPU unpacks the weight each
            time, which costs as much as multiplying some 200.
        adds: it takes what its product is added to (`models.layers.added`).
    """

    inputs_at_once = 256
    adds = True
    offsets: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, weight_format: QuantFormat, bias: torch.dtype | None = None
    ) -> None:
        super().__init__(out_features, in_features, weight_format)
        self.place: int | None = None  # among the linears that their site multiplies as one
        self.register_buffer("offsets", None, persistent=False)
        self.bias = None if bias is None else nn.Parameter(torch.empty(out_features, dtype=bias), requires_grad=False)

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.columns

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.rows

    @classmethod
    def like(cls, linear: nn.Linear, weight_format: QuantFormat) -> PackedLinear:
        """Return one of a linear's shape, on its device and with its bias, that waits for its codes (`keep`)."""
        bias = None if linear.bias is None else linear.bias.dtype
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, weight_format, bias)
        new.reserve(linear.weight.device)
        new.bias = linear.bias
        return new.train(linear.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantized: Quantized, weight_format: QuantFormat) -> PackedLinear:
        """Take the codes of a linear's weight, and its bias."""
        new = cls.like(linear, weight_format)
        new.keep(quantized)
        return new

    @property
    def takes_integers(self) -> bool:
        """Whether the integer path knows its grid: one scale a row."""
        return isinstance(self.weight_format.granularity, PerChannel)

    @torch.no_grad()
    def prepare_offsets(self) -> None:
        """Make what products with zero points need of the codes, which must be loaded."""
        if self.offsets is None:
            with torch.inference_mode(False):
                self.offsets = weight_offsets(self.codes, self.zero, self.weight_format.bits)

    def forward(self, x: Tensor | IntegerTokens, residual: Tensor | None = None) -> Tensor:
        """Return x W^T + b, [..., O], added to a residual of the activations' dtype where there is one."""
        weight = self.codes, self.scale, self.weight_format.bits, self.bias
        if isinstance(x, IntegerTokens):
            if not x.products or self.place is None:
                assert x.sum is not None or self.zero is None
                return integer_linear(x, *weight, self.offsets, residual)
            y = x.products[self.place]
        elif (
            self.takes_integers and self.zero is None and x.dtype in (torch.float16, torch.bfloat16) and uses_triton(x)
        ):
            return mixed_linear(x, *weight, residual)
        elif x.device.type == "cpu":
            y = value_linear(x, self.codes, self.scale, self.zero, self.weight_format.bits, self.bias)
        else:
            y = F.linear(x, dequantize(self.quantized(), x.dtype), self.bias)
        return y if residual is None else residual + y
