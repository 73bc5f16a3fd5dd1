"""Dream's configuration: the keys of the published config.json; values that are not implemented are refused."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from starquant.models.config_values import rotary_base


class DreamConfig(PreTrainedConfig):
    """The keys of a published Dream config.json; unsupported values are refused."""

    model_type = "Dream"

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 131072,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1000000.0,
        rope_scaling: dict[str, object] | None = None,
        mask_token_id: int = 151666,
        use_sliding_window: bool = False,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        """Take the published keys; raises ValueError for values this implementation does not have."""
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range, self.rms_norm_eps = initializer_range, rms_norm_eps
        self.rope_theta = rope_theta = rotary_base("Dream", rope_theta, kwargs.pop("rope_parameters", None))
        self.mask_token_id = mask_token_id
        self.use_sliding_window = use_sliding_window
        if hidden_act != "silu":
            raise ValueError(f"Dream config: hidden_act={hidden_act!r} is not supported; allowed: 'silu'")
        if rope_scaling is not None:
            raise ValueError(f"Dream config: rope_scaling={rope_scaling!r} is not supported; allowed: null")
        if use_sliding_window:
            raise ValueError("Dream config: use_sliding_window=true is not supported; allowed: false")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"Dream config: hidden_size={hidden_size} is not divisible by num_attention_heads={num_attention_heads}"
            )
        if num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"Dream config: num_attention_heads={num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens."""
        return self.max_position_embeddings
