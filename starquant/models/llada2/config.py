"""LLaDA2's configuration: the keys of the published config.json; values that are not implemented are refused.

Keys that the published code does not read (norm_topk_prob, score_function, router_dtype, dropouts, ...) are kept.
Block length and mask token are in no published config.json.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from starquant.models.config_values import refuse_others, rotary_base, validate_block, validate_divides, validate_whole

PUBLISHED_MASK = 156895  # <|mask|> of inclusionAI/LLaDA2.*
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_bias": (False, None),
    "use_qk_norm": (True,),
    "use_qkv_bias": (False, None),
}


class LLaDA2MoeConfig(PreTrainedConfig):
    """The keys of a published LLaDA2 config.json; unknown keys are kept, unsupported values are refused."""

    model_type = "llada2_moe"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        intermediate_size: int = 5120,
        moe_intermediate_size: int = 512,
        num_hidden_layers: int = 20,
        first_k_dense_replace: int = 1,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int = 128,
        num_experts: int = 256,
        num_experts_per_tok: int = 8,
        num_shared_experts: int | None = 1,
        n_group: int = 8,
        topk_group: int = 4,
        routed_scaling_factor: float = 2.5,
        partial_rotary_factor: float = 0.5,
        rope_theta: float = 600000.0,
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        block_length: int = 32,
        mask_token_id: int | None = None,
        pad_token_id: int | None = 156892,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the published keys; raises ValueError for values this implementation does not have."""
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.moe_intermediate_size, self.num_hidden_layers = moe_intermediate_size, num_hidden_layers
        self.first_k_dense_replace = first_k_dense_replace
        self.num_attention_heads, self.head_dim = num_attention_heads, head_dim
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.num_shared_experts = num_shared_experts or 0
        self.n_group, self.topk_group, self.routed_scaling_factor = n_group, topk_group, routed_scaling_factor
        self.partial_rotary_factor = partial_rotary_factor
        self.rope_theta = rotary_base("LLaDA2", rope_theta, kwargs.pop("rope_parameters", None))
        self.rms_norm_eps, self.initializer_range = rms_norm_eps, initializer_range
        self.max_position_embeddings, self.block_length = max_position_embeddings, block_length
        if mask_token_id is None and vocab_size > PUBLISHED_MASK:
            mask_token_id = PUBLISHED_MASK
        self.mask_token_id = mask_token_id
        refuse_others("LLaDA2", kwargs, _SUPPORTED)
        kwargs.pop("rope_scaling", None)  # null; transformers 5 has another spelling
        self._validate()
        ids = {"pad_token_id": pad_token_id, "eos_token_id": pad_token_id if eos_token_id is None else eos_token_id}
        super().__init__(**{"tie_word_embeddings": False} | kwargs | ids)

    def _validate(self) -> None:
        whole = ("head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
        validate_whole(self, "LLaDA2", *whole)
        validate_whole(self, "LLaDA2", "first_k_dense_replace", "num_shared_experts", least=0)
        validate_divides(self, "LLaDA2", "num_attention_heads", "num_key_value_heads")
        validate_divides(self, "LLaDA2", "num_experts", "n_group")
        validate_block(self, "LLaDA2", "block_length", self.max_position_embeddings)
        if self.topk_group > self.n_group:
            raise ValueError(f"LLaDA2 config: topk_group={self.topk_group}, allowed: 1 to n_group={self.n_group}")
        if self.num_experts // self.n_group < 2:
            raise ValueError(
                f"LLaDA2 config: n_group={self.n_group}, allowed: 1 to {self.num_experts // 2}, "
                f"with two or more of the num_experts={self.num_experts} in each"
            )
        reachable = self.num_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"LLaDA2 config: num_experts_per_tok={self.num_experts_per_tok}, allowed: 1 to {reachable}, "
                f"the experts of topk_group={self.topk_group} groups"
            )
        factor = self.routed_scaling_factor
        if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < 1e6:
            raise ValueError(f"LLaDA2 config: routed_scaling_factor={factor!r}, allowed: a number above 0")
        rotated = self.rotated
        if not 0 < rotated <= self.head_dim or rotated % 2:
            raise ValueError(
                f"LLaDA2 config: partial_rotary_factor={self.partial_rotary_factor!r} turns {rotated} of "
                f"head_dim={self.head_dim} dimensions, allowed: an even number of them"
            )

    @property
    def rotated(self) -> int:
        """Dimensions of a head that the rotary embedding turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens."""
        return self.max_position_embeddings
