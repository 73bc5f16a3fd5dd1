"""What the linears of a block are: architecture knowledge as data, with counts that are required.

A role is never read off a name: in LLaDA `ff_out` names both every block's down-projection and the LM head, and a name
filter that spares the head silently leaves all down-projections at 16 bits.

A dense block has one linear a role. In a mixture every expert has its own: `ExpertRole(Role.UP, 3)`. Experts read rows
of one shared input (`Site.GATE_UP`), while what each down-projection reads is its expert's (`ExpertSite`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from torch import nn

from starquant.models.layers import InputSite, RotaryAttention
from starquant.numerics import BIDIRECTIONAL, States


class Site(str, Enum):
    """The inputs of a block that linears read; q/k/v share one, gate/up share one."""

    QKV = "qkv_input"
    OUT = "out_input"
    GATE_UP = "gate_up_input"
    DOWN = "down_input"

    @property
    def kind(self) -> Site:
        """The site itself, which is no expert's."""
        return self


@dataclass(frozen=True)
class ExpertSite:
    """An input that only one expert's linears read."""

    kind: Site
    expert: int

    @property
    def value(self) -> str:
        """Its name."""
        return f"expert_{self.expert}.{self.kind.value}"


SiteKey = Site | ExpertSite


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
    def kind(self) -> Role:
        """The role itself, which is no expert's."""
        return self

    @property
    def site(self) -> Site:
        """The input site this role reads."""
        return _SITE_OF[self]

    def beside(self, role: Role) -> LinearKey:
        """Return another role of the same expert: of none."""
        return role


@dataclass(frozen=True)
class ExpertRole:
    """What a linear is to its expert."""

    kind: Role
    expert: int

    @property
    def value(self) -> str:
        """Its name."""
        return f"expert_{self.expert}.{self.kind.value}"

    @property
    def site(self) -> SiteKey:
        """The input site this role reads: the down-projection's is its expert's own."""
        return ExpertSite(Site.DOWN, self.expert) if self.kind is Role.DOWN else self.kind.site

    def beside(self, role: Role) -> LinearKey:
        """Return another role of the same expert."""
        return ExpertRole(role, self.expert)


LinearKey = Role | ExpertRole

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
    """One block's linears by role, its input sites, its attention, and the norms in front of two of the sites.

    Linears and sites come in the order of the forward pass.

    Attributes:
        routers: linears at 16 bits that read what a norm gives, in front of its site's transform: they follow whatever
            is folded into the norm.
        experts: modules that compute one expert each from what `Site.GATE_UP` gives, (h, context).
        states: token states of the model, as it declares them.
    """

    linears: Mapping[LinearKey, nn.Linear]
    inputs: Mapping[SiteKey, InputSite]
    attention: RotaryAttention
    norms: Mapping[SiteKey, nn.Module]
    routers: Mapping[SiteKey, nn.Linear] = field(default_factory=dict)
    experts: Mapping[int, nn.Module] = field(default_factory=dict)
    states: States = BIDIRECTIONAL

    def readers(self, site: SiteKey) -> dict[LinearKey, nn.Linear]:
        """Return the linears that read a site."""
        return {role: linear for role, linear in self.linears.items() if role.site == site}

    def behind_norm(self, site: SiteKey) -> list[nn.Linear]:
        """Return all linears that read what a site's norm gives: the site's own, and a router."""
        routers = [self.routers[site]] if site in self.routers else []
        return [*self.readers(site).values(), *routers]

    def of_kind(self, kind: Role) -> dict[LinearKey, nn.Linear]:
        """Return the linears of one role: one, or one an expert."""
        return {role: linear for role, linear in self.linears.items() if role.kind is kind}

    def width(self, site: SiteKey) -> int:
        """Return the channels of a site."""
        return next(iter(self.readers(site).values())).in_features


@dataclass(frozen=True)
class LinearInfo:
    """One linear of the model: qualified name, role, block index, module, and its input site's name."""

    name: str
    role: LinearKey
    block: int
    module: nn.Linear
    site: str


def require_count(linears: Mapping[str, object], expected: int, where: str) -> None:
    """Raise AssertionError unless exactly `expected` linears are declared."""
    if len(linears) != expected:
        raise AssertionError(f"{where} declares {len(linears)} linears in its blocks, the architecture has {expected}")
