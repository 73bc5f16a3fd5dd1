"""FlatQuant (arXiv 2410.09426): invertible transforms and clips of every block, learned on the block's own output.

- In front of q/k/v, gate/up and down stands a Kronecker product of two invertible matrices, in front of the output
  projection one across heads; each is undone in the linears behind it. Values are transformed within heads for free:
  folded into their projection, undone in the output projection. Queries and keys are, online, where one is quantized.
- Scales of channels fold into norms and up projections.
- Weight rows, inputs and attention operands each cover a learned share of their range, at both ends.
- Weights are then rounded to nearest.

docs/reproduction.md says what deviates from the published code.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

from starquant.calibration.site_statistics import Collect
from starquant.calibration.walk import BlockVisit
from starquant.config.bits import BitsSpec
from starquant.config.methods.flatquant import FlatQuantOptions
from starquant.errors import CheckpointError, DataError
from starquant.methods.blockwise import BlockwiseMethod, Tensors
from starquant.methods.fitted import Fitted
from starquant.methods.flatquant.folding import (
    clip_block,
    cut_weights,
    gate_block,
    gate_tensors,
    rewrite_block,
    tensors_of,
)
from starquant.methods.flatquant.parameters import BlockParameters
from starquant.methods.flatquant.training import Loss, diverged, fewest_bits, mean_over_tokens, train
from starquant.methods.solvers import solve_block
from starquant.models.roles import BlockSites, SiteKey
from starquant.quantized import StateGate
from starquant.quantized.transforms import validate_invertible

FlatQuantT = TypeVar("FlatQuantT", bound=FlatQuantOptions)


class FlatQuant(BlockwiseMethod[FlatQuantT]):
    """Learn, fold, round."""

    loss: ClassVar[Loss] = staticmethod(mean_over_tokens)

    def gates(self, sites: BlockSites, block: int, bits: BitsSpec) -> dict[SiteKey, StateGate]:
        """Return the gates behind a block's transforms: none here."""
        return {}

    def learn(self, visit: BlockVisit, bits: BitsSpec, fitted: Fitted) -> Tensors:
        """Return transforms, scales and clips of a block; reports the error of its output."""
        statistics = visit.collect(Collect())
        absmax = {site: seen.moments().absmax for site, seen in statistics.items() if not seen.empty}
        seed = self.options.start_seed + visit.index
        learned = BlockParameters(visit.sites, absmax, bits, self.options, seed)
        row: dict[str, object] = {"block": visit.index, "site": "block output"}
        gates = self.gates(visit.sites, visit.index, bits)
        if fewest_bits(bits) < 16:
            first, last = train(visit, learned, bits, self.options, gates, type(self).loss)
            row |= {"error_first_epoch": first, "error_last_epoch": last}
            if last > first:
                fitted.note("output error above that of the first epoch", visit.name)
        tensors = tensors_of(learned, visit.sites) | gate_tensors(gates)
        _validate_matrices(tensors, visit.name)
        fitted.report.append(row)
        return tensors

    def rewrite(self, sites: BlockSites, tensors: Tensors) -> None:
        """Fold transforms and scales."""
        rewrite_block(sites, tensors)

    def compensate(self, sites: BlockSites, tensors: Tensors, bits: BitsSpec) -> None:
        """Put gates and clips in place."""
        gate_block(sites, tensors, bits)
        clip_block(sites, tensors, bits)

    def _fit_block(self, visit: BlockVisit, bits: BitsSpec, fed: BitsSpec, fitted: Fitted) -> Tensors:
        """Cut weight rows before GPTQ solves them."""
        tensors = self.learn(visit, bits, fitted)
        self.rewrite_visit(visit, tensors)
        if self.solves(bits):
            cut_weights(visit.sites, tensors, list(visit.sites.linears))
            tensors |= solve_block(visit, fed, self.options.weights, fitted, self.weighted)
        return tensors


def _validate_matrices(tensors: Tensors, where: str) -> None:
    """Refuse what cannot be folded or loaded again: values that are not finite, matrices that are (almost) singular."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise diverged(where)
    for name, tensor in tensors.items():
        if ".factor_" in name or name.endswith(".matrix"):
            try:
                validate_invertible(tensor, f"{where} {name}")
            except CheckpointError as error:
                raise DataError(f"{error}; lower method.learning_rate") from None
