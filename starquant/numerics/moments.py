"""Statistics of activations, accumulated chunk by chunk in float64 and merged without loss.

Shapes: N rows (tokens), D channels. Accumulators take the number of channels and the device of the first chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from starquant.errors import DataError

#: Up to this many channels, second moments on the CPU are multiplied in float64; beyond, a float32 product is used.
_DOUBLE_CHANNELS = 1024
#: Up to this many channels, second moments are summed in float64; beyond, in float32, as GPTQ then takes them: a block
#: of 8B has a dozen sums of 4,096 channels, and one of 12,288 or 18,944, which is 0.6 or 1.4 GB.
_DOUBLE_SUMS = 2048
#: Channels of a block of a symmetric product; of twice 384 on a CPU a quarter of the work is saved, of many half.
_BLOCK = {"cpu": 384, "cuda": 2048}


def all_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; one pass, where `isfinite` takes several and a mask."""
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x.detach())).isfinite().all())


def validate_finite_tensor(x: Tensor, what: str) -> None:
    """Raise when a tensor holds NaN or infinity.

    Raises:
        DataError: naming `what`.
    """
    if not all_finite(x):
        raise DataError(f"{what}: holds values that are not finite")


def _seen(value: Tensor | None) -> Tensor:
    if value is None:
        raise DataError("activation statistics: no rows were seen")
    return value


class ChannelMoments:
    """Per-channel mean, variance, mean magnitude and largest magnitude.

    Mean and squared deviation are merged by Chan's formula, so a large mean does not drown a small variance.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean_D: Tensor | None = None
        self._deviation_D: Tensor | None = None
        self._abs_sum_D: Tensor | None = None
        self._absmax_D: Tensor | None = None

    def update(self, x_ND: Tensor) -> None:
        """Add rows.

        Raises:
            DataError: values that are not finite.
        """
        validate_finite_tensor(x_ND, "activation statistics")
        if len(x_ND) == 0:
            return
        x_ND = x_ND.detach().double()
        mean_D = x_ND.mean(0)
        chunk = ChannelMoments()
        chunk.count = len(x_ND)
        chunk._mean_D = mean_D
        chunk._deviation_D = (x_ND - mean_D).square_().sum(0)
        magnitude_ND = x_ND.abs()
        chunk._abs_sum_D = magnitude_ND.sum(0)
        chunk._absmax_D = magnitude_ND.amax(0)
        self.merge(chunk)

    def merge(self, other: ChannelMoments) -> None:
        """Add everything that `other` has seen."""
        if other.count == 0:
            return
        theirs = [_seen(t) for t in (other._mean_D, other._deviation_D, other._abs_sum_D, other._absmax_D)]
        if self.count == 0:
            self._mean_D, self._deviation_D, self._abs_sum_D, self._absmax_D = (t.clone() for t in theirs)
            self.count = other.count
            return
        mean_D, deviation_D = _seen(self._mean_D), _seen(self._deviation_D)
        their_mean_D, their_deviation_D, their_sum_D, their_max_D = (t.to(mean_D.device) for t in theirs)
        total = self.count + other.count
        shift_D = their_mean_D - mean_D
        self._mean_D = mean_D + shift_D * (other.count / total)
        self._deviation_D = deviation_D + their_deviation_D + shift_D.square() * (self.count * other.count / total)
        self._abs_sum_D = _seen(self._abs_sum_D) + their_sum_D
        self._absmax_D = torch.maximum(_seen(self._absmax_D), their_max_D)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, float64 [D]; like the others raises DataError when no rows were seen."""
        return _seen(self._mean_D)

    @property
    def variance(self) -> Tensor:
        """Population variance (divided by the count) of each channel."""
        return _seen(self._deviation_D) / self.count

    @property
    def mean_abs(self) -> Tensor:
        """Mean of |x| of each channel."""
        return _seen(self._abs_sum_D) / self.count

    @property
    def absmax(self) -> Tensor:
        """Largest |x| of each channel."""
        return _seen(self._absmax_D)

    @property
    def rms(self) -> Tensor:
        """Root of the mean square of each channel."""
        return (self.variance + self.mean.square()).sqrt_()


class SecondMoment:
    """Sum of x~ x~^T over rows, x~ = w x, [D, D] in float64; beyond 2,048 channels products and sum are float32.

    Where other rows y are added beside x, the sum of y~ x~^T.

    A chunk's own product is computed in float64 if the chunk is float64, or on the CPU for D <= 1024; else in float32.
    Of a symmetric one the blocks above the diagonal are not computed, but filled in once somebody reads the sum.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum_DD: Tensor | None = None
        self._filled = True

    def update(self, x_ND: Tensor, weight_N: Tensor | None = None, beside_ND: Tensor | None = None) -> None:
        """Add rows, each multiplied by its weight first; a weighted row still counts as one.

        Args:
            x_ND: rows.
            weight_N: w of each; None for 1.
            beside_ND: y of each, in x's dtype; None for x itself.

        Raises:
            DataError: values or weights that are not finite.
        """
        for rows_ND in (x_ND,) if beside_ND is None else (x_ND, beside_ND):
            validate_finite_tensor(rows_ND, "activation statistics")
        if len(x_ND) == 0:
            return
        exact = x_ND.dtype == torch.float64 or (not x_ND.is_cuda and x_ND.shape[1] <= _DOUBLE_CHANNELS)
        dtype = torch.float64 if exact else torch.float32
        x_ND = x_ND.detach().to(dtype)
        y_ND = x_ND if beside_ND is None else beside_ND.detach().to(dtype)
        if weight_N is not None:
            validate_finite_tensor(weight_N, "token weights")
            x_ND, y_ND = (rows_ND * weight_N.to(rows_ND)[:, None] for rows_ND in (x_ND, y_ND))
        if self._sum_DD is None:
            width = x_ND.shape[1]
            kind = torch.float64 if width <= _DOUBLE_SUMS else torch.float32
            self._sum_DD = torch.zeros(width, width, dtype=kind, device=x_ND.device)
        _add_product(self._sum_DD, y_ND, x_ND, symmetric=beside_ND is None)
        self._filled &= beside_ND is not None
        self.count += len(x_ND)

    def merge(self, other: SecondMoment) -> None:
        """Add everything that `other` has seen."""
        if not other.count:
            return
        theirs_DD = _seen(other._sum_DD)
        self._sum_DD = theirs_DD.clone() if self._sum_DD is None else self._sum_DD.add_(theirs_DD.to(self._sum_DD))
        self._filled &= other._filled
        self.count += other.count

    @property
    def total(self) -> Tensor:
        """The sum itself, not a copy; raises DataError when no rows were seen."""
        sum_DD = _seen(self._sum_DD)
        if not self._filled:
            for block in _blocks(sum_DD):
                sum_DD[: block.start, block] = sum_DD[block, : block.start].T
            self._filled = True
        return sum_DD

    @property
    def mean(self) -> Tensor:
        """The sum divided by the count of rows; raises DataError when no rows were seen."""
        return self.total / self.count


def _blocks(sum_DD: Tensor) -> Iterator[slice]:
    """Yield runs of channels."""
    width, size = len(sum_DD), _BLOCK.get(sum_DD.device.type, _BLOCK["cpu"])
    yield from (slice(start, min(start + size, width)) for start in range(0, width, size))


def _add_product(sum_DD: Tensor, y_ND: Tensor, x_ND: Tensor, symmetric: bool) -> None:
    """Add y^T x in the rows' dtype, of a symmetric one the blocks up to the diagonal; no second matrix of its size."""
    for block in _blocks(sum_DD):
        there_bD = sum_DD[block, : block.stop] if symmetric else sum_DD[block]
        columns_ND = x_ND[:, : there_bD.shape[1]]
        if x_ND.dtype == sum_DD.dtype:
            there_bD.addmm_(y_ND[:, block].T, columns_ND)
        else:
            there_bD += y_ND[:, block].T @ columns_ND


class RowSample:
    """A uniform sample of at most `capacity` rows, the same however the rows are batched.

    Every row draws a key from a generator on the CPU; the rows with the smallest keys stay, in order of arrival.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.seen = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows_ND: Tensor | None = None

    def update(self, x_ND: Tensor) -> None:
        """Offer rows.

        Raises:
            DataError: values that are not finite.
        """
        validate_finite_tensor(x_ND, "activation sample")
        x_ND = x_ND.detach()
        keys = torch.rand(len(x_ND), generator=self._generator, dtype=torch.float64)
        self.seen += len(x_ND)
        held = len(self._keys)
        chosen = torch.cat((self._keys, keys)).argsort(stable=True)[: self.capacity].sort().values
        new = x_ND[(chosen[chosen >= held] - held).to(x_ND.device)]
        self._keys = torch.cat((self._keys, keys))[chosen]
        if self._rows_ND is None:
            self._rows_ND = new
        elif len(new):
            old = chosen[chosen < held].to(self._rows_ND.device)
            self._rows_ND = torch.cat((self._rows_ND[old], new.to(self._rows_ND)))

    @property
    def rows(self) -> Tensor:
        """The sample [n, D], n <= capacity, in order of arrival; raises DataError when no rows were seen."""
        return _seen(self._rows_ND)
