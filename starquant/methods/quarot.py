"""QuaRot (arXiv 2404.00456): rotations spread outliers over all channels and leave the function unchanged.

- Gains of the norms are folded into the linears behind them, then the residual stream is rotated, h -> h R, by folding
  R into every weight that reads or writes it: free at run time.
- Each value head is rotated by one Hadamard matrix, undone in the output projection: free too.
- The down projection's input, behind a nonlinearity, is rotated online, and so is the output projection's across heads,
  where the number of heads has a Hadamard matrix.
- Queries and keys may be rotated online after the rotary embedding; their products do not change.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from starquant.calibration.batches import CalibrationStates
from starquant.config.bits import BitsSpec
from starquant.config.methods.quarot import QuaRotOptions
from starquant.errors import ConfigError
from starquant.methods.blockwise import BlockwiseMethod, Tensors
from starquant.methods.fitted import Fitted
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import BlockSites, Role, Site
from starquant.numerics import Rotation, has_hadamard, random_rotation
from starquant.quantized import HadamardTransform, HeadsHadamard, rewriting, transform_queries_and_keys
from starquant.quantized.tables import is_tied
from starquant.session.progress import SILENT, Progress

QuaRotT = TypeVar("QuaRotT", bound=QuaRotOptions)


class QuaRot(BlockwiseMethod[QuaRotT]):
    """Rotate, then round."""

    def ends(
        self,
        model: MaskedDiffusionModel,
        bits: BitsSpec,
        fitted: Fitted,
        states: CalibrationStates | None = None,
        progress: Progress = SILENT,
    ) -> Tensors:
        """Return the residual rotation; note where the heads cannot be mixed."""
        heads = model.block_sites(model.trunk().blocks[0]).attention.n_heads
        if self.options.out_hadamard and not has_hadamard(heads):
            fitted.note(f"no Hadamard matrix across {heads} heads: out_hadamard without effect", "all blocks")
        if self.options.residual_rotation == "none":
            return {}
        width = model.trunk().embedding.embedding_dim
        return random_rotation(self.options.residual_rotation, width, self.options.rotation_seed).to_tensors()

    def validate(self, model: MaskedDiffusionModel, bits: BitsSpec) -> None:
        """Judge widths and the head as well.

        Raises:
            ConfigError: a tied head, which cannot take the last norm's gain; a width that no Hadamard matrix fits.
        """
        super().validate(model, bits)
        if self.options.residual_rotation != "none" and is_tied(model):
            raise ConfigError(
                f"method.residual_rotation: got '{self.options.residual_rotation}', but the head is tied to the "
                "embedding and cannot take the last norm's gain; allowed: none"
            )
        if self.options.at_bits(bits).online != self.options.online:  # "auto" that nobody decided would be off
            raise ConfigError(
                "method.qk_hadamard: got auto with queries or keys below 16 bits; allowed: true, false, or what the "
                "options' `at_bits(bits)` makes of it, as run.py does"
            )
        sites = model.block_sites(model.trunk().blocks[0])
        head, options = sites.attention.head_dim, self.options
        needed = {
            "residual_rotation": (options.residual_rotation == "hadamard", model.trunk().embedding.embedding_dim),
            "head_hadamard": (options.head_hadamard, head),
            "qk_hadamard": (options.qk_hadamard is True, head),
        }
        downs = {linear.in_features for linear in sites.of_kind(Role.DOWN).values()}
        rotations = [*needed.items(), *(("down_hadamard", (options.down_hadamard, width)) for width in sorted(downs))]
        for name, (wanted, width) in rotations:
            if wanted and not has_hadamard(width):
                instead = "orthogonal, none" if name == "residual_rotation" else "false"
                got = "hadamard" if name == "residual_rotation" else "true"
                raise ConfigError(
                    f"method.{name}: got {got}, but no Hadamard matrix of size {width} is known; allowed: {instead}"
                )

    def embed(self, hidden_BLD: Tensor, ends: Tensors) -> Tensor:
        """Return h R."""
        rotation = Rotation.from_tensors(ends)
        return hidden_BLD if rotation is None else rotation.apply(hidden_BLD.double()).to(hidden_BLD)

    def rewrite_ends(self, model: MaskedDiffusionModel, ends: Tensors) -> None:
        """Rotate the embedding; fold the last norm's gain and the rotation into the head."""
        rotation = Rotation.from_tensors(ends)
        if rotation is None:
            return
        trunk = model.trunk()
        assert trunk.head is not None  # `validate` refuses a tied one
        rewriting.fold_gain(trunk.norm, [trunk.head])
        rewriting.rotate_input([trunk.head], rotation)
        rewriting.map_rows(trunk.embedding.weight, rotation.apply)
        model.to_original_basis = rotation.inverse

    def prepare(self, sites: BlockSites, ends: Tensors) -> None:
        """Fold gains and rotations into a block, and put the online transforms at its sites."""
        with rewriting.rounded_once(sites):
            self.fold(sites, ends)
            self.place(sites)

    def fold(self, sites: BlockSites, ends: Tensors) -> None:
        """Fold gains and rotations into a block; rotate queries and keys."""
        rotation = Rotation.from_tensors(ends)
        if rotation is not None:
            for site, norm in sites.norms.items():
                readers = sites.behind_norm(site)
                rewriting.fold_gain(norm, readers)
                rewriting.rotate_input(readers, rotation)
            for linear in (*sites.of_kind(Role.OUT).values(), *sites.of_kind(Role.DOWN).values()):
                rewriting.rotate_output(linear, rotation)
        attention = sites.attention
        if self.options.head_hadamard:
            rewriting.hadamard_heads_output(sites.linears[Role.V], attention.n_kv_heads)
            rewriting.hadamard_heads_input(sites.linears[Role.OUT], attention.n_heads)
        if self.options.qk_hadamard is True:
            transform_queries_and_keys(attention, HadamardTransform(attention.head_dim))

    def place(self, sites: BlockSites) -> None:
        """Put the online Hadamards at the sites behind no norm."""
        attention = sites.attention
        if self.options.out_hadamard and has_hadamard(attention.n_heads):
            rewriting.hadamard_across_heads_input(sites.linears[Role.OUT], attention.n_heads)
            sites.inputs[Site.OUT].transform = HeadsHadamard(attention.n_heads)
        if self.options.down_hadamard:
            for role, down in sites.of_kind(Role.DOWN).items():
                rewriting.hadamard_input(down)
                sites.inputs[role.site].transform = HadamardTransform(down.in_features)
