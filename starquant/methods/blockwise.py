"""Methods that rewrite each block exactly and then quantize it: the walk, shared by all of them.

A method overrides what it needs of: `ends` and `prepare` (rewritings known without data), `learn` (what it takes from
a block's statistics) and `rewrite` (the rewriting learned). Everything but `learn` runs twice, on a copy in `fit` and
on the model in `apply`, so that both see the same weights.
"""

from __future__ import annotations

import functools
from typing import TypeVar

from torch import Tensor

from starquant.calibration.batches import CalibrationStates
from starquant.calibration.walk import BlockVisit, walk
from starquant.config.bits import BitsSpec, weights_only
from starquant.config.methods.base import BlockwiseOptions
from starquant.errors import ConfigError, RecordError
from starquant.methods.base import Method
from starquant.methods.fitted import ENDS, Fitted, block_part
from starquant.methods.rare_experts import note_rare_experts, with_rare_experts
from starquant.methods.solvers import solve_block, stored_weights
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import BlockSites
from starquant.quantized.install import install, quantize_block, validate_fit
from starquant.quantized.tables import round_embedded
from starquant.session.progress import SILENT, Progress
from starquant.store.manifest import ManifestEntry

Tensors = dict[str, Tensor]


BlockwiseT = TypeVar("BlockwiseT", bound=BlockwiseOptions)


class BlockwiseMethod(Method[BlockwiseT]):
    """Rewrite, then quantize, block by block."""

    def ends(
        self,
        model: MaskedDiffusionModel,
        bits: BitsSpec,
        fitted: Fitted,
        states: CalibrationStates | None = None,
        progress: Progress = SILENT,
    ) -> Tensors:
        """Return what concerns the residual stream as a whole."""
        return {}

    def embed(self, hidden_BLD: Tensor, ends: Tensors) -> Tensor:
        """Map the embedding to the basis of the rewritten blocks."""
        return hidden_BLD

    def rewrite_ends(self, model: MaskedDiffusionModel, ends: Tensors) -> None:
        """Rewrite embedding, last norm and head in place."""

    def prepare(self, sites: BlockSites, ends: Tensors) -> None:
        """Rewrite a block in place by what is known without data."""

    def learn(self, visit: BlockVisit, bits: BitsSpec, fitted: Fitted) -> Tensors:
        """Return what the method takes from a prepared block's statistics."""
        return {}

    def rewrite(self, sites: BlockSites, tensors: Tensors) -> None:
        """Rewrite a prepared block in place by what was learned."""

    def compensate(self, sites: BlockSites, tensors: Tensors, bits: BitsSpec) -> None:
        """Put at a rewritten block's sites what is no exact rewriting; only where something is quantized.

        Called once or more, with the same outcome. It may not change weights where GPTQ has solved them (RuntimeError).
        """

    def observed(self, model: MaskedDiffusionModel, states: CalibrationStates) -> CalibrationStates:
        """Return the states that are walked, where the method weights them."""
        return states

    def solves(self, bits: BitsSpec) -> bool:
        """Return whether GPTQ solves the weights."""
        return self.options.weights.name == "gptq" and bits.weights.bits < 16

    @property
    def compares(self) -> bool:
        """Whether blocks are compared with the exact ones while the walk goes on."""
        return False

    @property
    def propagates(self) -> bool:
        """Whether weights make up for what roundings have done to their inputs."""
        return self.options.propagates

    @property
    def weighted(self) -> bool:
        """Whether second moments use the states' token weights."""
        return False

    def validate(self, model: MaskedDiffusionModel, bits: BitsSpec) -> None:
        """Judge group sizes and the head's bits."""
        validate_fit(model, bits)

    def fit(
        self,
        model: MaskedDiffusionModel,
        bits: BitsSpec,
        states: CalibrationStates | None = None,
        into: Fitted | None = None,
        progress: Progress = SILENT,
    ) -> Fitted:
        """Walk the blocks and keep what is learned of each."""
        fitted = into if into is not None else Fitted()
        self.validate(model, bits)
        if self.options.needs_calibration and states is None:
            raise ConfigError(f"fit: method '{self.options.name}' needs calibration states, got None")
        if self.propagates and states is not None and states.inputs == "full_precision":
            raise ConfigError(
                "fit: got states with inputs 'full_precision', but weights.propagation makes up for roundings in front "
                "of a linear; allowed: quantized, quantized_weights"
            )
        ends = fitted.get(ENDS) if ENDS in fitted else self.ends(model, bits, fitted, states, progress)
        fitted.put(ENDS, ends)
        if self.options.needs_calibration:
            assert states is not None
            self._walk(model, bits, self.observed(model, states), ends, fitted, progress)
        return fitted

    def _walk(
        self,
        model: MaskedDiffusionModel,
        bits: BitsSpec,
        states: CalibrationStates,
        ends: Tensors,
        fitted: Fitted,
        progress: Progress,
    ) -> None:
        fed = bits if states.inputs == "quantized" else weights_only(bits)
        sequential = states.inputs != "full_precision" and bits.embedding < 16
        rounded = functools.partial(round_embedded, bits=bits) if sequential else None
        for visit in walk(model, states, lambda hidden: self.embed(hidden, ends), progress, rounded):
            self.prepare(visit.sites, ends)
            if self.compares or self.propagates:
                visit.keep_exact()
            if block_part(visit.index) in fitted:  # of a fit that was interrupted
                visit.observe()
                self.rewrite_visit(visit, fitted.get(block_part(visit.index)))
            else:
                tensors = self._fit_block(visit, bits, fed, fitted)
                note_rare_experts(visit, fitted)
                fitted.put(block_part(visit.index), tensors)
            if visit.feeds_quantized:
                self._compensate(visit.sites, fitted.get(block_part(visit.index)), bits)
                solve = stored_weights(fitted, bits, self.options.weights)
                quantize_block(model, visit.block, visit.index, fed, solve)

    def _compensate(self, sites: BlockSites, tensors: Tensors, bits: BitsSpec) -> None:
        compensates = type(self).compensate is not BlockwiseMethod.compensate
        linears = sites.linears.items() if compensates and self.solves(bits) else ()
        before = {role: linear.weight.detach().clone() for role, linear in linears}
        self.compensate(sites, tensors, bits)
        changed = [role.value for role, weight in before.items() if not sites.linears[role].weight.equal(weight)]
        if changed:
            raise RuntimeError(f"`compensate` changed weights that GPTQ had solved: {', '.join(changed)}")

    def _fit_block(self, visit: BlockVisit, bits: BitsSpec, fed: BitsSpec, fitted: Fitted) -> Tensors:
        tensors = self.learn(visit, bits, fitted)
        self.rewrite_visit(visit, tensors)
        if self.solves(bits):
            tensors |= solve_block(visit, fed, self.options.weights, fitted, self.weighted)
        return tensors

    def rewrite_visit(self, visit: BlockVisit, tensors: Tensors) -> None:
        """Rewrite a visited block; where inputs are compared behind their transforms, the exact one as well."""
        self.rewrite(visit.sites, tensors)
        if self.propagates:
            self.rewrite(visit.exact_sites, tensors)

    def apply(
        self,
        model: MaskedDiffusionModel,
        fitted: Fitted,
        bits: BitsSpec,
        progress: Progress = SILENT,
        packed: bool = False,
    ) -> list[ManifestEntry]:
        """Rewrite the model as the copies were, and install its quantizers.

        Raises:
            ConfigError: a method has been applied to the model already.
            RecordError: nothing was fitted for a block, or no codes for a linear that was to be solved.
        """
        if model.quantized:
            raise ConfigError("apply: a method has been applied to this model already; load it again")
        for index in range(len(model.trunk().blocks) if self.options.needs_calibration else 0):
            if block_part(index) not in fitted:
                raise RecordError(f"{block_part(index)}: nothing was fitted for it; fit on this model")
        ends = fitted.get(ENDS)
        self.rewrite_ends(model, ends)

        def rewrite(sites: BlockSites, index: int) -> None:
            tensors = fitted.get(block_part(index))
            self.prepare(sites, ends)
            self.rewrite(sites, tensors)
            if not bits.full_precision:
                self._compensate(sites, tensors, bits)

        entries = install(model, bits, stored_weights(fitted, bits, self.options.weights), progress, packed, rewrite)
        return with_rare_experts(entries, fitted)
