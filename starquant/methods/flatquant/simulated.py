"""A block that computes in float32 what it will compute once transformed and rounded, and passes gradients on."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.calibration.walk import BlockVisit
from starquant.config.bits import AttentionSpec, BitsSpec
from starquant.methods.flatquant.parameters import BlockParameters
from starquant.models.context import Context
from starquant.models.layers import AttentionCore, Front, InputSite, in_front
from starquant.models.roles import LinearKey, SiteKey
from starquant.numerics import QuantFormat, straight_through
from starquant.quantized.attention import CLIPPED, OPERANDS, KeyValueGrid, at_commit, operand_format, probabilities
from starquant.quantized.install import activation_format, weight_format


class _Linear(nn.Module):
    """A linear whose weight is made anew from what is learned, and rounded."""

    def __init__(self, linear: nn.Linear, role: LinearKey, learned: BlockParameters, fmt: QuantFormat) -> None:
        super().__init__()
        self.weight_OI, self.bias_O = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self.role, self.format = role, fmt
        self._learned = (learned,)  # not a part of this module

    def forward(self, x: Tensor) -> Tensor:
        """Return what the rounded linear gives."""
        (learned,) = self._learned
        weight_OI = learned.weight(self.role, self.weight_OI)
        if self.format.quantizes:
            weight_OI = straight_through(weight_OI, self.format)
        return F.linear(x, weight_OI, learned.bias(self.role, self.bias_O))


class _Site(InputSite):
    """A site that transforms, gates and rounds."""

    def __init__(self, site: SiteKey, learned: BlockParameters, fmt: QuantFormat, gate: nn.Module | None) -> None:
        super().__init__()
        self.site, self.format, self.gate = site, fmt, gate
        self._learned = (learned,)

    def forward(self, x_BLD: Tensor, context: Context | None = None, front: Front = None) -> Tensor:
        """Return what the linears read."""
        (learned,) = self._learned
        x_BLD = learned.input(self.site, in_front(x_BLD, front))
        if self.gate is not None:
            x_BLD = self.gate(x_BLD, context)
        clip_E = learned.sites[self.site].clip_E
        if not self.format.quantizes:
            return x_BLD
        return straight_through(x_BLD, self.format, None if clip_E is None else clip_E.sigmoid())


class _Core(AttentionCore):
    """Attention on transformed and rounded operands."""

    def __init__(self, bits: AttentionSpec, learned: BlockParameters) -> None:
        super().__init__()
        kv = KeyValueGrid(bits.kv_symmetric, bits.kv_clip_ratio)
        self.formats = {name: operand_format(name, getattr(bits, name), kv) for name in OPERANDS}
        self.kv_at = bits.kv_at
        self._learned = (learned,)

    def forward(self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, H, L, E]."""
        q, k = self._transformed(q_BHLE, k_BKLE)
        return self._product(q, self._round("k", k), self._round("v", v_BKLE), mask)

    def attend(self, q_BHWE: Tensor, k_BKWE: Tensor, v_BKWE: Tensor, context: Context, layer: nn.Module) -> Tensor:
        """Attend in a pass, as `QuantizedAttentionCore`."""
        if self.kv_at == "read":
            return super().attend(q_BHWE, k_BKWE, v_BKWE, context, layer)
        q, k = self._transformed(q_BHWE, k_BKWE)
        return self._product(q, *at_commit(self._round, k, v_BKWE, context, layer))

    def _transformed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        now = self._learned[0].now_keys
        return (q, k) if now is None else (q @ now.dual, k @ now.matrix)

    def _product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q = self._round("q", q)
        if not self.formats["p"].quantizes:
            return super().forward(q, k, v, mask)
        p_BHLL = straight_through(probabilities(q, k, mask), self.formats["p"])
        return p_BHLL @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)

    def _round(self, name: str, x: Tensor) -> Tensor:
        if not self.formats[name].quantizes:
            return x
        logits_OE = self._learned[0].operand_clip_OE
        clip_E = None if logits_OE is None else logits_OE[CLIPPED.index(name)].sigmoid()
        return straight_through(x, self.formats[name], clip_E)


def simulated_block(
    visit: BlockVisit, learned: BlockParameters, bits: BitsSpec, gates: Mapping[SiteKey, nn.Module]
) -> nn.Module:
    """Return a float32 copy of a visit's block that transforms and rounds by what is learned.

    Args:
        visit: its block is at full precision and stays as it is.
        learned: of this block.
        bits: grids.
        gates: what stands behind the transform of a site.
    """
    block = copy.deepcopy(visit.block).float()
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    weights, inputs, prefix = weight_format(bits.weights), activation_format(bits.activations), f"{visit.name}."
    sites = visit.model.block_sites(block)
    paths = {module: path for path, module in block.named_modules()}
    for info in visit.model.block_linears(block, visit.index).values():
        path = info.name.removeprefix(prefix)
        block.set_submodule(path, _Linear(info.module, info.role, learned, weights))
    for site, module in sites.inputs.items():
        block.set_submodule(paths[module], _Site(site, learned, inputs, gates.get(site)))
    sites.attention.core = _Core(bits.attention, learned)
    return block.to(torch.float32)
