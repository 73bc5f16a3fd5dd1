"""What a digest is taken of: plain data without inert fields."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from starquant.config.fields import Spec


def digest_of(identity: dict[str, Any]) -> str:
    """Return sixteen hexadecimal digits that identify plain data."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_inert(spec: Spec) -> dict[str, Any]:
    """Return a specification as plain data, without what cannot change a score."""
    data: dict[str, Any] = {}
    for name, field in type(spec).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("inert"):
            continue
        value = getattr(spec, name)
        data[name] = without_inert(value) if isinstance(value, Spec) else _as_data(value)
    return data


def _as_data(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _as_data(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
