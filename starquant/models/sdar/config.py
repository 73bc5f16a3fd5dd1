"""SDAR's configuration: the keys of the published config.json; values that are not implemented are refused.

Keys of training (attn_implementation, fuse_cross_entropy, ep_size, ...) and of sliding windows are kept, and not read.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from starquant.models.config_values import refuse_others, rotary_base, validate_block, validate_divides, validate_whole

PUBLISHED_EOS, PUBLISHED_END = 151643, 151645  # <|endoftext|> and <|im_end|>
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
}


class SDARConfig(PreTrainedConfig):
    """The keys of a published SDAR config.json; unknown keys are kept, unsupported values are refused."""

    model_type = "sdar"
    attribute_map: ClassVar[dict[str, str]] = {"block_length": "block_size"}

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        intermediate_size: int = 12288,
        num_hidden_layers: int = 36,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int = 128,
        block_size: int = 4,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1000000.0,
        initializer_range: float = 0.02,
        mask_token_id: int = 151669,
        eot_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        """Take the published keys; raises ValueError for values this implementation does not have."""
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim, self.block_size = head_dim, block_size
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps, self.initializer_range = rms_norm_eps, initializer_range
        self.rope_theta = rotary_base("SDAR", rope_theta, kwargs.pop("rope_parameters", None))
        self.mask_token_id = mask_token_id
        refuse_others("SDAR", kwargs, _SUPPORTED)
        for key in ("rope_scaling", "attn_implementation"):  # null, and of training: transformers would read them
            kwargs.pop(key, None)
        validate_whole(self, "SDAR", "head_dim")
        validate_divides(self, "SDAR", "num_attention_heads", "num_key_value_heads")
        validate_block(self, "SDAR", "block_size", max_position_embeddings)
        if eot_token_id is None and kwargs.get("eos_token_id") == PUBLISHED_EOS:  # config.json names one of the two
            eot_token_id = PUBLISHED_END
        self.eot_token_id = eot_token_id
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings} | kwargs)

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens."""
        return self.max_position_embeddings
