"""What a W&B run is called and which settings stand beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starquant.config.run import RunSpec
from starquant.errors import ConfigError


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of dotted names."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}{key}.").items()}
    return {prefix[:-1]: value}


def settings_used(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a run used, by dotted name.

    These are what its digest is taken of, without what is null: no protocols of tasks that were not scored, no sampler
    of trajectories that were not recorded, nothing of a calibration or a fidelity that reads no text.

    Args:
        spec: as in a record. One that is no specification of today is returned whole.
    """
    try:
        identity = RunSpec.from_config(spec).canonical().identity()
    except ConfigError:
        return flatten(dict(spec))
    for part in ("calibration", "fidelity"):
        if identity[part]["source"] is None:
            identity[part] = {"name": identity[part]["name"]}
    return {name: value for name, value in flatten(identity).items() if value is not None}


def run_name(spec: Mapping[str, Any]) -> str:
    """Return a name that tells runs of other seeds apart: of the model, of what the method draws, of the evaluation."""
    model, method = spec["model"], spec["method"]
    parts = [model["name"] if model.get("seed") is None else f"{model['name']}:{model['seed']}"]
    parts += [spec["bits"]["name"], method["name"]]
    for kind in ("rotation", "start"):
        if method.get(f"{kind}_seed") is not None:
            parts.append(f"{kind}{method[f'{kind}_seed']}")
    return "-".join([*parts, f"seed{spec['seed']}"])
