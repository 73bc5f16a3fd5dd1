"""FreeAct (arXiv 2603.01776, second-hand: no code was published): FlatQuant with channels of one token state.

Masked tokens are rank-deficient, and so are the others: each state does without the last d/32 transformed channels of
the other (`numerics.gate_channels`), while one static weight serves both. The zeros act during training too, so that
transforms adapt to them; the loss is the sum of both states' output errors.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from starquant.calibration.walk import Example
from starquant.config.bits import BitsSpec
from starquant.config.methods.freeact import FreeActOptions
from starquant.methods.flatquant.method import FlatQuant
from starquant.methods.flatquant.training import Loss
from starquant.models.roles import BlockSites, Role, Site, SiteKey
from starquant.quantized import StateGate


def sum_of_states(error_BL: Tensor, example: Example) -> Tensor:
    """Return the sum of the mean squared errors of the tokens of each state, of those states that are there."""
    total = error_BL.new_zeros(())
    for axis in range(len(example.context.states)):
        here_BL = example.visible_BL & (example.context.state_BL == axis)
        if bool(here_BL.any()):
            total = total + error_BL[here_BL].mean()
    return total


class FreeAct(FlatQuant[FreeActOptions]):
    """Learn with gates, fold, gate, round."""

    loss: ClassVar[Loss] = staticmethod(sum_of_states)

    @property
    def drops(self) -> bool:
        """Gates drop directions."""
        return True

    def gates(self, sites: BlockSites, block: int, bits: BitsSpec) -> dict[SiteKey, StateGate]:
        """Return the gate of every site, where inputs are rounded."""
        made: dict[SiteKey, StateGate] = {}
        for site in sites.inputs if bits.activations.bits < 16 else ():
            if site is Site.QKV and block == 0 and not self.options.first_attention:
                continue
            width = sites.width(site)
            d_m, d_u = (round(share * width) for share in (self.options.masked, self.options.unmasked))
            made[site] = StateGate(width, d_m, d_u).to(sites.linears[Role.OUT].weight.device)
        return made
