"""The roles of a block's linears: architecture knowledge as data, with counts that are asserted.

A role is never found by matching a name: in LLaDA `ff_out` names both every block's down-projection and the
LM head, and a name filter that spares the head silently leaves all down-projections at 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import nn


class Site(str, Enum):
    """The four inputs of a block that linears read; q/k/v share one, gate/up share one."""

    QKV = "qkv_input"
    OUT = "out_input"
    GATE_UP = "gate_up_input"
    DOWN = "down_input"


class Role(str, Enum):
    """What a linear is to its block."""

    Q = "q_proj"
    K = "k_proj"
    V = "v_proj"
    OUT = "out_proj"
    GATE = "gate_proj"
    UP = "up_proj"
    DOWN = "down_proj"

    @property
    def site(self) -> Site:
        """The input site this role reads."""
        return _SITE_OF[self]


_SITE_OF = {
    Role.Q: Site.QKV,
    Role.K: Site.QKV,
    Role.V: Site.QKV,
    Role.OUT: Site.OUT,
    Role.GATE: Site.GATE_UP,
    Role.UP: Site.GATE_UP,
    Role.DOWN: Site.DOWN,
}
ROLES = tuple(Role)


@dataclass(frozen=True)
class BlockSites:
    """One block's linears by role, its input sites, its attention, and the norms in front of two of the sites."""

    linears: Mapping[Role, nn.Linear]
    inputs: Mapping[Site, nn.Module]
    attention: nn.Module
    norms: Mapping[Site, nn.Module]

    def readers(self, site: Site) -> dict[Role, nn.Linear]:
        """Return the linears that read a site."""
        return {role: linear for role, linear in self.linears.items() if role.site is site}


@dataclass(frozen=True)
class LinearInfo:
    """One linear of the model: qualified name, role, block index, module, and its input site's name."""

    name: str
    role: Role
    block: int
    module: nn.Linear
    site: str


def expect_count(found: Mapping[str, object], expected: int, where: str) -> None:
    """Raise AssertionError unless exactly `expected` linears were found."""
    if len(found) != expected:
        raise AssertionError(f"{where} declares {len(found)} linears in its blocks, the architecture has {expected}")
