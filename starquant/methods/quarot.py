"""QuaRot (arXiv 2404.00456): rotations spread outliers over all channels and leave the function unchanged.

- Gains of the norms are folded into the linears behind them, then the residual stream is rotated, h -> h R, by folding
  R into every weight that reads or writes it: free at run time.
- Each value head is rotated by one Hadamard matrix, undone in the output projection: free too.
- The down projection's input, behind a nonlinearity, is rotated online, and so is the output projection's across heads,
  where the number of heads has a Hadamard matrix.
- Queries and keys may be rotated online after the rotary embedding; their products do not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from starquant.config.bits import BitsSpec
from starquant.config.fields import Ratio, Seed
from starquant.methods.base import Card
from starquant.methods.blockwise import BlockwiseMethod, BlockwiseOptions, Tensors
from starquant.methods.fitted import Fitted
from starquant.methods.solvers import WeightSolverOptions
from starquant.session.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from starquant.calibration.batches import CalibrationStates
    from starquant.models.base import MaskedDiffusionModel
    from starquant.models.roles import BlockSites


class QuaRotOptions(BlockwiseOptions):
    """Which rotations, and how weights are rounded.

    Attributes:
        residual_rotation: "hadamard" with random signs, "orthogonal" (Haar, for widths without a Hadamard matrix),
            or "none", which leaves gains unfolded as well.
        rotation_seed: of the random signs or matrix.
        head_hadamard: rotate value heads.
        out_hadamard: rotate across heads online, in front of the output projection; without effect, and noted,
            where no Hadamard matrix has the number of heads.
        down_hadamard: rotate the down projection's input online.
        qk_hadamard: rotate queries and keys online; worth it where `bits.attention` quantizes them.
        activation_clip: share of each token's largest magnitude that its grid covers; null takes
            `bits.activations.clip_ratio`.
    """

    name: Literal["quarot"]
    residual_rotation: Literal["hadamard", "orthogonal", "none"] = "hadamard"
    rotation_seed: Seed = 0
    head_hadamard: bool = True
    out_hadamard: bool = True
    down_hadamard: bool = True
    qk_hadamard: bool = False
    activation_clip: Ratio | None = None
    weights: WeightSolverOptions = WeightSolverOptions(name="gptq", mse_clip=True)


class QuaRotRTNOptions(QuaRotOptions):
    """QuaRot's options with weights rounded to nearest."""

    name: Literal["quarot_rtn"]  # type: ignore[assignment]
    weights: WeightSolverOptions = WeightSolverOptions()


class QuaRot(BlockwiseMethod[QuaRotOptions]):
    """Rotate, then round."""

    card = Card(reference="arXiv 2404.00456", transforms=True)
    Options = QuaRotOptions

    def effective(self, bits: BitsSpec) -> BitsSpec:
        """Put the method's clip ratio into the activations' grid."""
        if self.options.activation_clip is None:
            return bits
        clipped = bits.activations.model_copy(update={"clip_ratio": self.options.activation_clip})
        return bits.model_copy(update={"activations": clipped})

    def ends(
        self,
        model: MaskedDiffusionModel,
        bits: BitsSpec,
        fitted: Fitted,
        states: CalibrationStates | None = None,
        progress: Progress = SILENT,
    ) -> Tensors:
        """Return the residual rotation; note where the heads cannot be mixed."""
        from starquant.numerics import has_hadamard, random_rotation

        heads = model.block_sites(model.trunk().blocks[0]).attention.n_heads
        if self.options.out_hadamard and not has_hadamard(heads):
            fitted.note(f"no Hadamard matrix across {heads} heads: out_hadamard without effect", "all blocks")
        if self.options.residual_rotation == "none":
            return {}
        width = model.trunk().embedding.embedding_dim
        return random_rotation(self.options.residual_rotation, width, self.options.rotation_seed).to_tensors()

    def check(self, model: MaskedDiffusionModel, bits: BitsSpec) -> None:
        """Judge widths and the head as well.

        Raises:
            ConfigError: a tied head, which cannot take the last norm's gain; a width that no Hadamard matrix fits.
        """
        from starquant.errors import ConfigError
        from starquant.models.roles import Role
        from starquant.numerics import has_hadamard
        from starquant.quantized.install import is_tied

        super().check(model, bits)
        if self.options.residual_rotation != "none" and is_tied(model):
            raise ConfigError(
                f"method.residual_rotation: got '{self.options.residual_rotation}', but the head is tied to the "
                "embedding and cannot take the last norm's gain; allowed: none"
            )
        sites = model.block_sites(model.trunk().blocks[0])
        head, options = sites.attention.head_dim, self.options
        asked = {
            "residual_rotation": (options.residual_rotation == "hadamard", model.trunk().embedding.embedding_dim),
            "head_hadamard": (options.head_hadamard, head),
            "qk_hadamard": (options.qk_hadamard, head),
            "down_hadamard": (options.down_hadamard, sites.linears[Role.DOWN].in_features),
        }
        for name, (wanted, width) in asked.items():
            if wanted and not has_hadamard(width):
                instead = "orthogonal, none" if name == "residual_rotation" else "false"
                got = "hadamard" if name == "residual_rotation" else "true"
                raise ConfigError(
                    f"method.{name}: got {got}, but no Hadamard matrix of size {width} is known; allowed: {instead}"
                )

    def embed(self, hidden_BLD: Tensor, ends: Tensors) -> Tensor:
        """Return h R."""
        from starquant.numerics import Rotation

        rotation = Rotation.from_tensors(ends)
        return hidden_BLD if rotation is None else rotation.apply(hidden_BLD.double()).to(hidden_BLD)

    def rewrite_ends(self, model: MaskedDiffusionModel, ends: Tensors) -> None:
        """Rotate the embedding; fold the last norm's gain and the rotation into the head."""
        import torch

        from starquant.numerics import Rotation
        from starquant.quantized import rewriting

        rotation = Rotation.from_tensors(ends)
        if rotation is None:
            return
        trunk = model.trunk()
        rewriting.fold_gain(trunk.norm, [trunk.head])
        rewriting.rotate_input([trunk.head], rotation)
        with torch.no_grad():
            trunk.embedding.weight.copy_(rotation.apply(trunk.embedding.weight.double()))
        model.to_original_basis = rotation.inverse

    def prepare(self, sites: BlockSites, ends: Tensors) -> None:
        """Fold gains and rotations into a block, and put the online transforms at its sites."""
        self.fold(sites, ends)
        self.place(sites)

    def fold(self, sites: BlockSites, ends: Tensors) -> None:
        """Fold gains and rotations into a block; rotate queries and keys."""
        from starquant.models.roles import Role
        from starquant.numerics import Rotation
        from starquant.quantized import HadamardTransform, rewriting, transform_queries_and_keys

        rotation = Rotation.from_tensors(ends)
        if rotation is not None:
            for site, norm in sites.norms.items():
                readers = list(sites.readers(site).values())
                rewriting.fold_gain(norm, readers)
                rewriting.rotate_input(readers, rotation)
            for role in (Role.OUT, Role.DOWN):
                rewriting.rotate_output(sites.linears[role], rotation)
        attention = sites.attention
        if self.options.head_hadamard:
            rewriting.hadamard_heads_output(sites.linears[Role.V], attention.n_kv_heads)
            rewriting.hadamard_heads_input(sites.linears[Role.OUT], attention.n_heads)
        if self.options.qk_hadamard:
            transform_queries_and_keys(attention, HadamardTransform(attention.head_dim))

    def place(self, sites: BlockSites) -> None:
        """Put the online Hadamards at the sites behind no norm."""
        from starquant.models.roles import Role, Site
        from starquant.numerics import has_hadamard
        from starquant.quantized import HadamardTransform, HeadsHadamard, rewriting

        attention = sites.attention
        if self.options.out_hadamard and has_hadamard(attention.n_heads):
            rewriting.hadamard_across_heads_input(sites.linears[Role.OUT], attention.n_heads)
            sites.inputs[Site.OUT].transform = HeadsHadamard(attention.n_heads)
        if self.options.down_hadamard:
            down = sites.linears[Role.DOWN]
            rewriting.hadamard_input(down)
            sites.inputs[Site.DOWN].transform = HadamardTransform(down.in_features)


class QuaRotRTN(QuaRot):
    """The same without calibration."""

    Options = QuaRotRTNOptions
