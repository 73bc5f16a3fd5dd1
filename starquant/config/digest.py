"""What a digest is taken of: plain data without inert fields."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from starquant.config.fields import Spec


def digest_of(identity: dict[str, Any]) -> str:
    """Return sixteen hexadecimal digits that identify plain data."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_inert(spec: Spec) -> dict[str, Any]:
    """Return a specification as plain data, without what cannot change a score."""
    data: dict[str, Any] = {}
    for name, field in type(spec).model_fields.items():
        if _is_inert(field):
            continue
        value = getattr(spec, name)
        data[name] = without_inert(value) if isinstance(value, Spec) else _as_data(value)
    return data


def inert_keys(kind: type[Spec], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of what cannot change a score."""
    for name, field in kind.model_fields.items():
        inside = field.annotation
        if _is_inert(field):
            yield prefix + name
        elif isinstance(inside, type) and issubclass(inside, Spec):
            yield from inert_keys(inside, f"{prefix}{name}.")


def _is_inert(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("inert"))


def _as_data(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _as_data(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
