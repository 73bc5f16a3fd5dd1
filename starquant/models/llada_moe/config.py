"""LLaDA-MoE's configuration: the keys of the published config.json; values that are not implemented are refused.

Keys that the published code does not read (norm_topk_prob, routed_scaling_factor, groups, score function) are kept.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from starquant.models.config_values import refuse_others, rotary_base, validate_divides, validate_whole

PUBLISHED_MASK = 156895  # <|mask|> of inclusionAI/LLaDA-MoE-7B-A1B-*, which config.json does not name
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "clip_qkv": (None,),
    "hidden_act": ("silu",),
    "moe_router_enable_expert_bias": (False, None),
    "partial_rotary_factor": (1,),
    "qk_layernorm": (True,),
    "rope_scaling": (None,),
    "shared_expert_intermediate_size": (None,),
}


class LLaDAMoEConfig(PreTrainedConfig):
    """The keys of a published LLaDA-MoE config.json; unknown keys are kept, unsupported values are refused."""

    model_type = "llada"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        num_experts: int = 64,
        num_experts_per_tok: int = 8,
        expert_intermediate_size: int = 1024,
        dense_intermediate_size: int = 8192,
        moe_layer_freq: list[int] | None = None,
        max_position_embeddings: int = 8192,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 50000.0,
        initializer_range: float = 0.02,
        mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the published keys; raises ValueError for values this implementation does not have."""
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.expert_intermediate_size = expert_intermediate_size
        self.dense_intermediate_size = dense_intermediate_size
        self.moe_layer_freq = [1] * num_hidden_layers if moe_layer_freq is None else moe_layer_freq
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps, self.initializer_range = rms_norm_eps, initializer_range
        self.rope_theta = rotary_base("LLaDA-MoE", rope_theta, kwargs.pop("rope_parameters", None))
        if mask_token_id is None and vocab_size > PUBLISHED_MASK:
            mask_token_id = PUBLISHED_MASK
        self.mask_token_id = mask_token_id
        refuse_others("LLaDA-MoE", kwargs, _SUPPORTED)
        kwargs.pop("rope_scaling", None)  # null; transformers 5 has another spelling
        self._validate()
        super().__init__(**{"tie_word_embeddings": False} | kwargs)

    def _validate(self) -> None:
        whole = ("num_experts", "num_experts_per_tok", "expert_intermediate_size", "dense_intermediate_size")
        validate_whole(self, "LLaDA-MoE", *whole)
        validate_divides(self, "LLaDA-MoE", "hidden_size", "num_attention_heads")
        validate_divides(self, "LLaDA-MoE", "num_attention_heads", "num_key_value_heads")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"LLaDA-MoE config: num_experts_per_tok={self.num_experts_per_tok}, "
                f"allowed: 1 to num_experts={self.num_experts}"
            )
        layers = self.moe_layer_freq
        if (
            not isinstance(layers, list)
            or len(layers) != self.num_hidden_layers
            or any(flag not in (0, 1) for flag in layers)
        ):
            raise ValueError(
                f"LLaDA-MoE config: moe_layer_freq={layers}, allowed: 0 or 1 for each of the "
                f"{self.num_hidden_layers} layers"
            )

    @property
    def feed_forward_size(self) -> int:
        """Widest feed-forward that a token goes through: a dense layer's, or that of its experts together."""
        return max(self.dense_intermediate_size, self.num_experts_per_tok * self.expert_intermediate_size)

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens."""
        return self.max_position_embeddings
