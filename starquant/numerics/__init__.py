"""Pure tensor mathematics of quantization; imports torch and no other room."""

from starquant.numerics.affine import PairMoments, moment_matching, ridge_least_squares, symmetric_power
from starquant.numerics.clipping import mse_clip, output_clip
from starquant.numerics.formats import Granularity, PerChannel, PerGroup, PerToken, QuantFormat
from starquant.numerics.gptq import GPTQResult, gptq
from starquant.numerics.hadamard import (
    apply_hadamard,
    hadamard_matrix,
    hadamard_pair,
    hadamard_signs,
    has_hadamard,
    random_orthogonal,
    random_signs,
)
from starquant.numerics.metrics import SqnrMeter, sqnr_db
from starquant.numerics.moments import ChannelMoments, RowSample, SecondMoment, all_finite
from starquant.numerics.orthogonal import apply_kronecker, cayley, dual, fermat_sizes, kronecker_sizes
from starquant.numerics.rms_norm import rms_norm
from starquant.numerics.rotation import Rotation, random_rotation
from starquant.numerics.rounding import Quantized, dequantize, fake_quantize, quantize
from starquant.numerics.row_cut import cut_rows
from starquant.numerics.row_pieces import by_rows, rows_at_once
from starquant.numerics.straight_through import straight_through
from starquant.numerics.token_states import BIDIRECTIONAL, States, TokenState, gate_channels, state_indices

__all__ = [
    "BIDIRECTIONAL",
    "ChannelMoments",
    "GPTQResult",
    "Granularity",
    "PairMoments",
    "PerChannel",
    "PerGroup",
    "PerToken",
    "QuantFormat",
    "Quantized",
    "Rotation",
    "RowSample",
    "SecondMoment",
    "SqnrMeter",
    "States",
    "TokenState",
    "all_finite",
    "apply_hadamard",
    "apply_kronecker",
    "by_rows",
    "cayley",
    "cut_rows",
    "dequantize",
    "dual",
    "fake_quantize",
    "fermat_sizes",
    "gate_channels",
    "gptq",
    "hadamard_matrix",
    "hadamard_pair",
    "hadamard_signs",
    "has_hadamard",
    "kronecker_sizes",
    "moment_matching",
    "mse_clip",
    "output_clip",
    "quantize",
    "random_orthogonal",
    "random_rotation",
    "random_signs",
    "ridge_least_squares",
    "rms_norm",
    "rows_at_once",
    "sqnr_db",
    "state_indices",
    "straight_through",
    "symmetric_power",
]
