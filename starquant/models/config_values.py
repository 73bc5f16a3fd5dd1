"""The numbers of a checkpoint's config.json, judged before a model is built from them.

Keys are those of any family; what a family alone has its configuration class judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

#: Whole numbers and their largest value: ten times and more what any published model has.
_WHOLE = {
    **dict.fromkeys(("d_model", "hidden_size"), 2**18),
    **dict.fromkeys(("n_heads", "num_attention_heads", "n_kv_heads", "num_key_value_heads"), 2**14),
    **dict.fromkeys(("n_layers", "num_hidden_layers"), 2**13),
    **dict.fromkeys(("mlp_hidden_size", "intermediate_size"), 2**20),
    **dict.fromkeys(("vocab_size", "embedding_size"), 2**24),
    **dict.fromkeys(("max_sequence_length", "max_position_embeddings"), 2**31 - 1),
    "num_labels": 2**16,  # transformers makes a name for each
}
#: Numbers and their range.
_REAL = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps"), (1e-12, 1.0)),
    **dict.fromkeys(("initializer_range", "init_std"), (0.0, 100.0)),
    "rope_theta": (1.0, 1e12),
    "mlp_ratio": (1e-3, 1024.0),
}
#: Keys that may be null: they follow from others.
_NULLABLE = (
    *("n_kv_heads", "num_key_value_heads", "mlp_hidden_size", "embedding_size", "multi_query_attention"),
    *("initializer_range", "init_std", "num_labels"),
)
_SWITCH = ("weight_tying", "tie_word_embeddings", "use_sliding_window", "multi_query_attention")
_ID = "_token_id"


def validate_values(config: Mapping[str, Any]) -> None:
    """Judge every number of a config.json.

    Raises:
        ValueError: a number that is not finite, of the wrong type or out of range; the message names the key.
    """
    for path, value in _leaves(config):
        key = path.rpartition(".")[2]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path}: got {value!r}, allowed: a finite number")
        judged = _rule(key)
        if judged is None or (value is None and (key in _NULLABLE or key.endswith(_ID))):
            continue
        sound, allowed = judged
        if not sound(value):
            raise ValueError(f"{path}: got {str(value)[:40]!r}, allowed: {allowed}")


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number: true and 1.0 are none."""
    return type(value) is int


def _rule(key: str) -> tuple[Callable[[Any], bool], str] | None:
    if key in _WHOLE:
        most = _WHOLE[key]
        return lambda v: is_whole(v) and 1 <= v <= most, f"a whole number, 1 to {most}"
    if key in _REAL:
        low, high = _REAL[key]
        return lambda v: _is_number(v) and low <= v <= high, f"a number, {low:g} to {high:g}"
    if key in _SWITCH:
        return lambda v: isinstance(v, bool), "true, false"
    if key.endswith(_ID):
        return _is_id, "a token id, or a list of them"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(is_whole(v) and v >= 0 for v in value)
    return is_whole(value) and value >= -1  # -1: of padding that there is none


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path of every value that is or should be no object; lists as a whole, and their members."""
    if isinstance(value, Mapping) and _rule(path.rpartition(".")[2]) is None:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
        return
    yield path, value
    if isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, Mapping | list | float):
                yield from _leaves(item, f"{path}.{index}")


def refuse_others(family: str, config: Mapping[str, Any], supported: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse values that a family's implementation does not have; raises ValueError.

    Args:
        family: its name, for the error.
        config: keys of a config.json; those that are missing are fine.
        supported: the values that each key may have.
    """
    for key, allowed in supported.items():
        if key in config and config[key] not in allowed:
            raise ValueError(f"{family} config: {key}={config[key]!r} is not supported; allowed: {allowed[0]!r}")


def validate_whole(config: Any, family: str, *keys: str, least: int = 1) -> None:
    """Raise ValueError for the first of some keys that is no whole number of at least `least`."""
    for key in keys:
        value = getattr(config, key)
        if not is_whole(value) or value < least:
            raise ValueError(f"{family} config: {key}={value!r}, allowed: a whole number, {least} or more")


def validate_divides(config: Any, family: str, key: str, divisor: str) -> None:
    """Raise ValueError where one key's value is not divisible by another's."""
    if getattr(config, key) % getattr(config, divisor):
        raise ValueError(
            f"{family} config: {key}={getattr(config, key)} is not divisible by {divisor}={getattr(config, divisor)}"
        )


def validate_block(config: Any, family: str, key: str, context: int) -> None:
    """Raise ValueError for a block length that is no whole number from 1 to the context's length."""
    value = getattr(config, key)
    if not is_whole(value) or not 1 <= value <= context:
        raise ValueError(f"{family} config: {key}={value!r}, allowed: a whole number, 1 to the context's {context}")


def rotary_base(family: str, rope_theta: float, parameters: object) -> float:
    """Return the base of the rotary embedding, from either spelling (`rope_parameters` is transformers 5's)."""
    if parameters is None:
        return rope_theta
    if not isinstance(parameters, dict) or parameters.get("rope_type", "default") != "default":
        raise ValueError(
            f"{family} config: rope_parameters={parameters!r} is not supported; allowed: rope_type 'default'"
        )
    return float(parameters.get("rope_theta", rope_theta))
