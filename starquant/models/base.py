"""What every masked-diffusion model family shares: the forward contract and the declared roles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from starquant.errors import ConfigError
from starquant.models.checkpoint import inspect
from starquant.models.context import Context, KeyValueCache, bidirectional, running_positions
from starquant.models.layers import Rotary, select
from starquant.models.roles import ROLES, BlockSites, LinearInfo, require_count
from starquant.models.validation import load_quantizations, validate_parameters
from starquant.numerics import BIDIRECTIONAL, States, state_indices


@dataclass(frozen=True)
class Trunk:
    """Handles to the parts of a model that the shared forward pass runs through, in order."""

    embedding: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear | None
    rotary: Rotary


class MaskedDiffusionModel(PreTrainedModel):
    """A transformer that predicts the token behind every [MASK].

    Subclasses name their parts (`trunk`) and the linears of one block (`block_sites`); one that is not bidirectional
    says who sees whom (`attention_mask`) and which token states it has (`states`, `context`), a mixture how many
    linears its blocks have (`linear_count`).
    """

    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = []
    #: Position whose hidden state predicts position i is i + logit_offset (Dream: -1, LLaDA: 0).
    logit_offset: ClassVar[int] = 0

    #: Token states, in the order of every axis of states; `BlockSites.states` are the same.
    states: ClassVar[States] = BIDIRECTIONAL

    #: Parameters that a checkpoint stores as one (`models.fused`).
    fused: ClassVar[dict[str, tuple[str, ...]]] = {}

    #: Where the blocks' parameters are read from while they run; None when they are in memory.
    stored_blocks: Any = None
    #: Maps the residual stream back to the checkpoint's basis; set by methods that rotate it.
    to_original_basis: Callable[[Tensor], Tensor] | None = None

    #: Runs the blocks of unpadded passes in place of `run_blocks` (`models.cuda_graphs`); None for nothing.
    replayed_blocks: Callable[[Tensor], Tensor] | None = None

    #: Set once a method has been applied: what lies in memory is then more than its parameters say.
    quantized: bool = False

    def trunk(self) -> Trunk:
        """Return the model's parts."""
        raise NotImplementedError

    def block_sites(self, block: Any) -> BlockSites:
        """Return the linears of one block by role, and the input sites in front of them."""
        raise NotImplementedError

    def linear_count(self) -> int:
        """Return how many linears the architecture has in its blocks."""
        return int(self.config.num_hidden_layers) * len(ROLES)

    def attention_mask(self, positions_BL: Tensor, visible_BL: Tensor | None) -> Tensor | None:
        """Return who sees whom: here every token every real one.

        Args:
            positions_BL: position of every token; [1, L] where all rows have the same.
            visible_BL: False on padding; None where nothing is padded.

        Returns:
            Boolean, broadcast to [B, H, L, L] (queries in rows), True where a key may be seen; None for everywhere.
            Queries on padding must see something, or their softmax is no number.
        """
        return bidirectional(visible_BL)

    def context(
        self,
        input_ids: Tensor,
        visible_BL: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Context:
        """Return what the blocks of one pass share; arguments as `forward`.

        Raises:
            ValueError: a visibility of another shape than the ids.
        """
        visible_BL = self.real_tokens(input_ids, visible_BL)
        if position_ids is None:
            position_ids = running_positions(input_ids, visible_BL)
        mask = self.attention_mask(position_ids, visible_BL)
        masked_BL = input_ids == self.mask_token_id
        return Context(self.trunk().rotary(position_ids), mask, masked_BL, visible_BL, cache)

    def token_states(self, input_ids: Tensor, visible_BL: Tensor | None, position_BL: Tensor | None) -> Tensor:
        """Return the states of tokens, as indices on the axis of `states`, [B, L]; arguments as `context`."""
        return state_indices(input_ids == self.mask_token_id)

    @staticmethod
    def real_tokens(input_ids: Tensor, visible_BL: Tensor | None) -> Tensor | None:
        """Return where tokens are no padding, None where none is; raises ValueError for another shape than the ids."""
        if visible_BL is None:
            return None
        if visible_BL.shape != input_ids.shape:
            want, got = tuple(input_ids.shape), tuple(visible_BL.shape)
            raise ValueError(f"attention_mask must have the shape of input_ids, {want}; got {got}")
        return None if bool(visible_BL.bool().all()) else visible_BL.bool()

    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(cast(Tensor, module.bias))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        logit_positions: tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | None = None,
        project: bool = True,
        **_: object,
    ) -> MaskedLMOutput:
        """Run one denoising pass.

        Args:
            input_ids: token ids [B, L].
            attention_mask: [B, L], nonzero where a token is real; padding may be on either side.
            position_ids: [B, L]; by default the running count of real tokens.
            output_hidden_states: also return (embedding, after block 0, ..., after block n-1, after the last
                norm), n + 2 tensors [B, L, D], in the model's own basis (`original_basis`).
            logit_positions: (rows [N], columns [N]): compute the head there only; logits are then [N, V].
            cache: keys and values of an earlier pass; only the columns of its window are computed (W instead of L).
            project: False leaves out the last norm and the head; hidden_states is then (after the last block,), or all
                with output_hidden_states.

        Returns:
            Logits [B, L, V] (or [N, V]), unshifted: `logit_offset` is the caller's business.

        Raises:
            ValueError: a mask of another shape than the ids.
        """
        states: list[Tensor] = []
        replayable = attention_mask is None and position_ids is None and cache is None and not output_hidden_states
        if replayable and self.replayed_blocks is not None:
            hidden = self.replayed_blocks(input_ids)
        else:
            seen = states if output_hidden_states else None
            hidden = self.run_blocks(input_ids, attention_mask, position_ids, cache, seen)
        if not project:
            return MaskedLMOutput(hidden_states=tuple(states) or (hidden,))
        normed = self.trunk().norm(hidden)
        logits = self.project(select(normed, logit_positions))
        return MaskedLMOutput(logits=logits, hidden_states=(*states, normed) if output_hidden_states else None)

    def run_blocks(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the hidden states [B, L, D] after the last block; arguments as `forward`.

        `states`, where it is given, is extended by the embedding and by what every block returns.
        """
        trunk = self.trunk()
        context = self.context(input_ids, attention_mask, position_ids, cache)
        hidden: Tensor = trunk.embedding(input_ids if cache is None else input_ids[:, cache.window])
        for block in trunk.blocks:
            if states is not None:
                states.append(hidden)
            hidden = block(hidden, context)
        if states is not None:
            states.append(hidden)
        return hidden

    def new_cache(self) -> KeyValueCache:
        """Return an empty cache for `forward`."""
        return KeyValueCache()

    def project(self, normed: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., D] after the last norm."""
        trunk = self.trunk()
        if trunk.head is None:  # tied: the embedding is the head
            return nn.functional.linear(normed, trunk.embedding.weight)
        logits: Tensor = trunk.head(normed)
        return logits

    def linears(self) -> dict[str, LinearInfo]:
        """Map the name of every linear inside the blocks to its role, block and input site.

        Raises:
            AssertionError: the count differs from what the architecture says (`linear_count`).
        """
        linears: dict[str, LinearInfo] = {}
        for index, block in enumerate(self.trunk().blocks):
            linears |= self.block_linears(block, index)
        require_count(linears, self.linear_count(), type(self).__name__)
        return linears

    def block_name(self, index: int) -> str:
        """Return the qualified name of a block."""
        blocks = self.trunk().blocks
        return f"{next(name for name, module in self.named_modules() if module is blocks)}.{index}"

    def block_linears(self, block: nn.Module, index: int) -> dict[str, LinearInfo]:
        """Map the qualified names of one block's linears to their roles; `block` may be a copy of block `index`."""
        prefix = self.block_name(index)
        names = {module: f"{prefix}.{name}" for name, module in block.named_modules()}
        sites = self.block_sites(block)
        infos = [
            LinearInfo(names[linear], role, index, linear, names[sites.inputs[role.site]])
            for role, linear in sites.linears.items()
        ]
        return {info.name: info for info in infos}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but judge a local folder first: it would fill what is missing with noise.

        Raises:
            CheckpointError: as `load_model`.
        """
        folder = Path(str(pretrained_model_name_or_path))
        if folder.is_dir():
            validate_parameters(inspect(folder), cls)
        else:  # a hub id: what is packed is judged once transformers has its files, if it knows the format
            load_quantizations()
        return cls.from_validated(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_validated(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder that has been judged already, as transformers does."""
        return super().from_pretrained(folder, *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does.

        Raises:
            ConfigError: the model is quantized: its online transforms and quantizers are not parameters, and what was
                saved would load as another function.
        """
        if self.quantized:
            raise ConfigError(
                "save_pretrained: this model is quantized; export it (`starquant.packed.export`), or copy its folder"
            )
        super().save_pretrained(*args, **kwargs)

    def original_basis(self, hidden_BLD: Tensor) -> Tensor:
        """Return the residual stream in the checkpoint's basis, whatever rotation a method folded into the weights."""
        return hidden_BLD if self.to_original_basis is None else self.to_original_basis(hidden_BLD)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding (transformers' protocol)."""
        return self.trunk().embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the LM head, None when tied (transformers' protocol)."""
        return self.trunk().head

    @property
    def mask_token_id(self) -> int:
        """The id of [MASK], from the checkpoint's config."""
        return int(self.config.mask_token_id)
