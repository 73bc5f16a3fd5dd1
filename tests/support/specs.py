"""Specifications, composed as the command line does."""

from __future__ import annotations

import copy
import functools
from typing import Any

import hydra
from omegaconf import OmegaConf

from starquant.config.bits import ActivationSpec, AttentionSpec, BitsSpec, WeightSpec
from starquant.config.run import RunSpec
from tests.support.paths import REPOSITORY

CONF = REPOSITORY / "conf"
OPTIONS = {group.name: sorted(p.stem for p in group.glob("*.yaml")) for group in CONF.iterdir() if group.is_dir()}
FOUR_BITS = BitsSpec(
    name="test", weights=WeightSpec(bits=4), activations=ActivationSpec(bits=4), attention=AttentionSpec(v=4, p=8)
)


def compose(*overrides: str) -> dict[str, Any]:
    """Compose as the command line does, but with the cheapest method unless one is named."""
    if not any(o.startswith("method=") for o in overrides):
        overrides = ("method=rtn", *overrides)
    return copy.deepcopy(_composed(overrides))  # a copy, to be changed at will


@functools.cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Composed once: the files of conf/ stay as they are while tests run."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("config", overrides=list(overrides)), resolve=True)


def spec(*overrides: str) -> RunSpec:
    return RunSpec.from_config(compose(*overrides))
