"""SwiGLU feed-forward layers under the names gate_proj, up_proj, down_proj, with their input sites."""

from __future__ import annotations

from torch import Tensor, nn

from starquant.models.context import Context
from starquant.models.layers import InputSite, RMSNorm, added
from starquant.models.roles import LinearKey, Role, Site, SiteKey


class Expert(nn.Module):
    """down(silu(gate(h)) * up(h)) of an input that is shared: its site stands outside.

    Args:
        width: of the model.
        hidden: of the layer.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.down_input = InputSite()

    def forward(self, h_BLD: Tensor, context: Context) -> Tensor:
        """Apply the gated feed-forward to what the shared site gives."""
        y_BLD: Tensor = self.down_proj(self.hidden(h_BLD, context))
        return y_BLD

    def hidden(self, h_BLD: Tensor, context: Context) -> Tensor:
        """Return what the down-projection reads."""
        hidden_BLF: Tensor = self.down_input(self.up_proj(h_BLD), context, self.gate_proj(h_BLD))
        return hidden_BLF


class FeedForward(Expert):
    """A dense layer: the same with an input site of its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.gate_up_input = InputSite()

    def forward(self, x_BLD: Tensor, context: Context, norm: RMSNorm) -> Tensor:  # type: ignore[override]
        """Add the gated feed-forward of the normalised residual stream to the stream."""
        return added(x_BLD, self.down_proj, self.hidden(self.gate_up_input(x_BLD, context, norm), context))

    def linears(self) -> dict[LinearKey, nn.Linear]:
        """Return the linears by role."""
        return dense_linears(self)

    def inputs(self) -> dict[SiteKey, InputSite]:
        """Return the input sites."""
        return {Site.GATE_UP: self.gate_up_input, Site.DOWN: self.down_input}


def dense_linears(layer: Expert) -> dict[LinearKey, nn.Linear]:
    """Return the linears, by role, of a layer that every token passes."""
    return {Role.GATE: layer.gate_proj, Role.UP: layer.up_proj, Role.DOWN: layer.down_proj}
