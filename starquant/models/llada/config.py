"""LLaDA's configuration: the keys of the published config.json.

Knobs that no published checkpoint uses (ALiBi, LayerNorm, biases, ...) are refused rather than ignored.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import PreTrainedConfig

# Key of the published config -> the values this implementation has; None means "absent or null".
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "activation_type": ("silu", "swiglu"),
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False, None),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "rope": (True,),
    "rope_scaling": (None,),
    "scale_logits": (False, None),
}

PUBLISHED_EOS, PUBLISHED_EOT = 126081, 126348  # <|endoftext|> and <|eot_id|> of GSAI-ML/LLaDA-8B-*


class LLaDAConfig(PreTrainedConfig):
    """The keys of a published LLaDA config.json; unknown keys are kept, unsupported values are refused."""

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "initializer_range": "init_std",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        n_layers: int = 32,
        mlp_hidden_size: int | None = None,
        mlp_ratio: float = 4,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        multi_query_attention: bool | None = None,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 500000.0,
        weight_tying: bool = False,
        mask_token_id: int = 126336,
        eot_token_id: int | None = None,
        init_std: float = 0.02,
        activation_type: str = "silu",
        block_type: str = "llama",
        layer_norm_type: str = "rms",
        layer_norm_with_affine: bool = True,
        rope: bool = True,
        **kwargs: Any,
    ) -> None:
        """Take the published keys; raises ValueError for values this implementation does not have."""
        self.d_model, self.n_heads, self.n_layers = d_model, n_heads, n_layers
        self.n_kv_heads = n_kv_heads
        self.multi_query_attention = multi_query_attention
        self.mlp_hidden_size, self.mlp_ratio = mlp_hidden_size, mlp_ratio
        self.vocab_size, self.embedding_size = vocab_size, embedding_size
        self.max_sequence_length = max_sequence_length
        self.rms_norm_eps, self.rope_theta = rms_norm_eps, rope_theta
        self.weight_tying = weight_tying
        self.mask_token_id = mask_token_id
        self.init_std = init_std
        self.activation_type, self.block_type = activation_type, block_type
        self.layer_norm_type, self.layer_norm_with_affine, self.rope = layer_norm_type, layer_norm_with_affine, rope
        self._validate_supported(kwargs)
        # The published configs name no <|eot_id|>; it follows from the published vocabulary.
        eos = kwargs.get("eos_token_id")
        if eot_token_id is None and PUBLISHED_EOS in (eos if isinstance(eos, list) else [eos]):
            eot_token_id = PUBLISHED_EOT
        self.eot_token_id = eot_token_id
        kwargs["tie_word_embeddings"] = False  # `weight_tying` leaves the head out altogether
        super().__init__(**kwargs)

    def _validate_supported(self, extra: dict[str, object]) -> None:
        for key, allowed in _SUPPORTED.items():
            value = extra.get(key, getattr(self, key, allowed[0]))
            if value not in allowed:
                raise ValueError(f"LLaDA config: {key}={value!r} is not supported; allowed: {allowed[0]!r}")
        _validate_positive(self, "d_model", "n_heads", "n_layers", "vocab_size", "rope_theta", "rms_norm_eps")
        if self.n_kv_heads is not None:
            _validate_positive(self, "n_kv_heads")
            if self.multi_query_attention and self.n_kv_heads != 1:
                raise ValueError(f"LLaDA config: multi_query_attention=true contradicts n_kv_heads={self.n_kv_heads}")
        if self.d_model % self.n_heads:
            raise ValueError(f"LLaDA config: d_model={self.d_model} is not divisible by n_heads={self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"LLaDA config: n_heads={self.n_heads} is not divisible by n_kv_heads={self.kv_heads}")

    @property
    def kv_heads(self) -> int:
        """Key/value heads: `n_kv_heads`, or 1 under multi-query attention, or `n_heads`."""
        if self.n_kv_heads is not None:
            return self.n_kv_heads
        return 1 if self.multi_query_attention else self.n_heads

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layer: `mlp_hidden_size`, or `mlp_ratio` times the model's width."""
        return self.mlp_hidden_size if self.mlp_hidden_size is not None else int(self.mlp_ratio * self.d_model)

    @property
    def rows(self) -> int:
        """Rows of embedding and head, which is the number of logits (`embedding_size` >= `vocab_size`)."""
        return self.embedding_size or self.vocab_size

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens."""
        return self.max_sequence_length


def _validate_positive(config: LLaDAConfig, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"LLaDA config: {key}={value!r} is not a positive number")
