"""LLaDA2's router: the best experts of the best groups, by sigmoid scores, with a bias that only chooses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.models.experts import Router
from starquant.models.llada2.config import LLaDA2MoeConfig


class GroupedSigmoidRouter(Router):
    """Scores s = sigmoid(x W^T), ranks r = s + bias, all in float32.

    Experts stand in groups; a group ranks by the sum of its two largest r. Of the best groups the largest r are chosen;
    their weights are s over the sum of the chosen, times a scaling.
    """

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, config.num_experts_per_tok)
        self.groups, self.kept_groups = config.n_group, config.topk_group
        self.scaling = config.routed_scaling_factor
        self.expert_bias = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return what stands in front of the sigmoid, float32 [B, L, E]."""
        return F.linear(x_BLD.float(), self.weight.float())

    def choose(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weights [B, L, K] in float32, chosen experts [B, L, K])."""
        score_BLE = self(x_BLD).sigmoid()
        rank_BLGE = (score_BLE + self.expert_bias.float()).unflatten(-1, (self.groups, -1))
        kept_BLG = rank_BLGE.topk(2, -1).values.sum(-1).topk(self.kept_groups, -1).indices
        closed_BLG1 = torch.ones_like(rank_BLGE[..., :1], dtype=torch.bool).scatter_(2, kept_BLG[..., None], False)
        rank_BLE = rank_BLGE.masked_fill(closed_BLG1, -torch.inf).flatten(-2)
        chosen_BLK = rank_BLE.topk(self.top_k, -1).indices
        weight_BLK = score_BLE.gather(-1, chosen_BLK)
        if self.top_k > 1:
            weight_BLK = weight_BLK / (weight_BLK.sum(-1, keepdim=True) + 1e-20)
        return weight_BLK * self.scaling, chosen_BLK
