"""The network in training: the frozen pretrained model with low-rank updates, as a masked-diffusion model.

Written for speed and apart from `starquant.models`, which runs what training leaves behind: W + B A as a Dream
checkpoint. Both compute the same function.

Shape suffixes: B rows, L tokens of a row, D width, H query heads, K key/value heads, E head width, R rank, O outputs,
I inputs, V vocabulary, N predicted positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.errors import CheckpointError
from starquant.testbed.smol.delta import LINEARS, NORMS


@dataclass(frozen=True)
class Dimensions:
    """Sizes of the pretrained model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float = 1e-5
    theta: float = 1e5

    @classmethod
    def of(cls, base: Mapping[str, Tensor], head_dim: int = 64) -> Dimensions:
        """Read the sizes off the base's tensors, which do not tell the width of a head."""
        q_OI, k_OI = (base[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
        layers = sum(name.endswith(".input_layernorm.weight") for name in base)
        vocabulary, width = base["model.embed_tokens.weight"].shape
        return cls(layers, width, len(q_OI) // head_dim, len(k_OI) // head_dim, head_dim, vocabulary)


def normalize(x_BLD: Tensor, scale_D: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm, computed in float32."""
    x = x_BLD.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * scale_D).to(x_BLD.dtype)


def rotate(x_BHLE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout, computed in float32; cos and sin are [B, 1, L, E]."""
    x = x_BHLE.float()
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x_BHLE.dtype)


class LowRankLinear(nn.Module):
    """W + B A with W frozen in the dtype of the pass, A and B in float32; B starts at zero."""

    def __init__(self, weight_OI: Tensor, rank: int, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        self.weight_OI: Tensor
        self.register_buffer("weight_OI", weight_OI.to(dtype))
        self.A = nn.Parameter(torch.randn(rank, inputs, generator=generator) / inputs**0.5)
        self.B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x_BLI: Tensor) -> Tensor:
        """Apply the linear, [B, L, O]."""
        update = F.linear(F.linear(x_BLI, self.A.to(x_BLI.dtype)), self.B.to(x_BLI.dtype))
        return F.linear(x_BLI, self.weight_OI) + update


class Block(nn.Module):
    """Pre-norm attention and SwiGLU; parameters have the delta's names."""

    def __init__(
        self, base: Mapping[str, Tensor], dimensions: Dimensions, linears: Mapping[str, LowRankLinear]
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.epsilon = dimensions.heads, dimensions.head_dim, dimensions.epsilon
        self.queries_a_key = dimensions.heads // dimensions.kv_heads
        self.n1, self.n2 = (nn.Parameter(base[f"{name}.weight"].float().clone()) for name in NORMS.values())
        self.q, self.k, self.v, self.o, self.g, self.u, self.d = (linears[name] for name in LINEARS)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, mask_B1LL: Tensor) -> Tensor:
        """Add attention and feed-forward to the residual stream."""
        h_BLD = normalize(x_BLD, self.n1, self.epsilon)
        q_BHLE = rotate(self._heads(self.q(h_BLD)), cos, sin)
        k_BKLE, v_BKLE = rotate(self._heads(self.k(h_BLD)), cos, sin), self._heads(self.v(h_BLD))
        k_BHLE, v_BHLE = (x.repeat_interleave(self.queries_a_key, 1) for x in (k_BKLE, v_BKLE))
        mask_BHLL = mask_B1LL.expand(-1, self.heads, -1, -1)
        z_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=mask_BHLL)
        z_BLD: Tensor = self.o(z_BHLE.transpose(1, 2).flatten(2))
        x_BLD = x_BLD + z_BLD
        h_BLD = normalize(x_BLD, self.n2, self.epsilon)
        y_BLD: Tensor = self.d(F.silu(self.g(h_BLD)) * self.u(h_BLD))
        return x_BLD + y_BLD

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)


class Network(nn.Module):
    """The base with its updates, the trained norms and the trained embedding of the mask token.

    Args:
        base: float32 weights under transformers' Llama names, the head tied to the embedding.
        dimensions: of the base; fewer layers than it has cut it.
        rank: of the updates.
        dtype: of the frozen weights and of the pass.
        seed: of the factors that do not start at zero.
    """

    def __init__(
        self, base: Mapping[str, Tensor], dimensions: Dimensions, rank: int, dtype: torch.dtype, seed: int
    ) -> None:
        super().__init__()
        self.dimensions, self.dtype = dimensions, dtype
        generator = torch.Generator().manual_seed(seed)
        embedding_VD = base["model.embed_tokens.weight"].float()
        self.embedding_VD: Tensor
        self.register_buffer("embedding_VD", embedding_VD.to(dtype))
        self.mask = nn.Parameter(embedding_VD.mean(0))
        self.blocks = nn.ModuleList()
        for layer in range(dimensions.layers):
            prefix = f"model.layers.{layer}."
            weights = {name.removeprefix(prefix): tensor for name, tensor in base.items() if name.startswith(prefix)}
            linears = {
                short: LowRankLinear(weights[f"{name}.weight"], rank, dtype, generator)
                for short, name in LINEARS.items()
            }
            self.blocks.append(Block(weights, dimensions, linears))
        self.nf = nn.Parameter(base["model.norm.weight"].float().clone())

    def forward(self, ids_BL: Tensor, position_BL: Tensor, segment_BL: Tensor, masked_BL: Tensor) -> Tensor:
        """Return the hidden states after the last norm, [B, L, D].

        Args:
            ids_BL: token ids, of masked tokens too.
            position_BL: place of every token in its segment.
            segment_BL: number of every token's segment: tokens see those of the same number.
            masked_BL: True where a token is replaced by the mask token.
        """
        embedded_BLD = F.embedding(ids_BL, self.embedding_VD)
        x_BLD = torch.where(masked_BL[..., None], self.mask.to(self.dtype), embedded_BLD)
        apart_BLL = segment_BL[:, :, None] != segment_BL[:, None, :]
        mask_B1LL = torch.zeros_like(apart_BLL, dtype=self.dtype).masked_fill_(apart_BLL, -torch.inf)[:, None]
        cos, sin = self._rotary(position_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD, cos, sin, mask_B1LL)
        return normalize(x_BLD, self.nf, self.dimensions.epsilon)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return float32 logits [N, V]; those of position i - 1 predict position i of the segment."""
        return F.linear(hidden_ND, self.embedding_VD).float()

    def _rotary(self, position_BL: Tensor) -> tuple[Tensor, Tensor]:
        even = torch.arange(0, self.dimensions.head_dim, 2, device=position_BL.device, dtype=torch.float32)
        angle = position_BL[:, None, :, None].float() / self.dimensions.theta ** (even / self.dimensions.head_dim)
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    def delta(self) -> dict[str, Tensor]:
        """Return what was trained as it is shipped: factors in bfloat16, norms and the mask embedding in float32."""
        return {
            name.removeprefix("blocks."): parameter.detach().to(_shipped_dtype(name), copy=True).cpu().contiguous()
            for name, parameter in self.named_parameters()
        }

    def start_from(self, delta: Mapping[str, Tensor]) -> None:
        """Take the values of a delta; one of more blocks is cut.

        Raises:
            CheckpointError: the delta lacks a tensor or has one of another shape.
        """
        for name, parameter in self.named_parameters():
            short = name.removeprefix("blocks.")
            if short not in delta:
                raise CheckpointError(f"--from: the delta has no {short}")
            if delta[short].shape != parameter.shape:
                got, want = tuple(delta[short].shape), tuple(parameter.shape)
                raise CheckpointError(f"--from: {short} has shape {got}, this network's is {want} (--rank sets it)")
            parameter.data.copy_(delta[short])


def _shipped_dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if name.endswith((".A", ".B")) else torch.float32
