"""Start a model of another architecture from a shipped dense LLaDA model: weights are copied where shapes allow.

Shape suffixes: S samples, L columns, N tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from starquant.models import load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.models.block_causal import BlockCausalModel
from starquant.models.context import Context
from starquant.models.experts import Mixture
from starquant.models.feed_forward import Expert
from starquant.models.pre_norm import PreNormBlock
from starquant.models.roles import BlockSites, Role, Site
from starquant.testbed.tiny.objectives import BALANCE, load_balance
from starquant.testbed.tiny.shipped import weights_folder

APART = 0.1  # noise on queries, of their standard deviation: equal heads would learn the same
FIT_TOKENS = 1024
#: Steps and learning rate of what is fitted to the dense model's layers.
ATTENTION_FIT, MIXTURE_FIT = (320, 1e-3), (800, 3e-3)


@dataclass(frozen=True)
class Layers:
    """What one block of the dense model gives on every sample.

    Attributes:
        ids: partly masked [S, L].
        real: which tokens are real [S, L].
        attention: input and output of its attention [S, L, D].
        feed_forward: input and output of its feed-forward layer [S, L, D].
        query: [S, L, D].
        key: [S, L, D].
    """

    ids: Tensor
    real: Tensor
    attention: tuple[Tensor, Tensor]
    feed_forward: tuple[Tensor, Tensor]
    query: Tensor
    key: Tensor


def warm_start(model: MaskedDiffusionModel, seed: int, samples: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Start from the shipped dense model `seed`: copy what fits, then fit each layer to the dense one's, in place.

    Query heads are repeated up to the number that the model has, the output projection shared among them. Norms of
    queries and keys scale to what the dense model's have on the samples. An expert takes a part of the dense layer's
    channels.

    Args:
        model: of as many blocks as the dense one.
        seed: of the dense model.
        samples: partly masked ids [S, L] and which tokens are real [S, L].
    """
    dense = load_model(weights_folder(seed))
    target, source = model.trunk(), dense.trunk()
    assert target.head is not None
    assert source.head is not None
    rows = target.embedding.num_embeddings
    with torch.no_grad():
        target.embedding.weight.copy_(source.embedding.weight[:rows])
        target.head.weight.copy_(source.head.weight[:rows])
        _copy(target.norm, source.norm)
    for block, old in zip(target.blocks, source.blocks, strict=True):
        assert isinstance(block, PreNormBlock)
        sites = dense.block_sites(old)
        layers = [_layers(dense, sites, *sample) for sample in samples]
        with torch.no_grad():
            _copy_attention(block, sites, layers)
            _copy_feed_forward(block, sites)
        if not isinstance(model, BlockCausalModel):  # which sees other tokens than the dense model does
            _fit_attention(model, block, layers)
        if isinstance(block.mlp, Mixture):
            _fit_mixture(block.mlp, layers)


@torch.no_grad()
def _layers(dense: MaskedDiffusionModel, sites: BlockSites, ids: Tensor, real: Tensor) -> Layers:
    modules = (
        *(sites.norms[Site.QKV], sites.linears[Role.OUT], sites.norms[Site.GATE_UP], sites.linears[Role.DOWN]),
        *(sites.linears[Role.Q], sites.linears[Role.K]),
    )
    seen: list[Tensor] = []  # in the order of the pass: input, queries, keys, output of attention, feed-forward's two
    hooks = [module.register_forward_hook(lambda _, __, y_SLD: seen.append(y_SLD)) for module in modules]
    try:
        dense(ids, attention_mask=real, project=False)
    finally:
        for hook in hooks:
            hook.remove()
    x, query, key, z, h, y = seen
    return Layers(ids, real, (x, z), (h, y), query, key)


def _fit_attention(model: MaskedDiffusionModel, block: PreNormBlock, layers: Sequence[Layers]) -> None:
    """Let attention give what the dense model's gives, with norms of queries and keys."""

    def lost(step: int) -> Tensor:
        one = layers[step % len(layers)]
        x_SLD, y_SLD = one.attention
        z_SLD = block.self_attn(x_SLD, model.context(one.ids, one.real), nn.Identity()) - x_SLD  # its input is normed
        error: Tensor = (z_SLD - y_SLD)[one.real].pow(2).mean() / y_SLD[one.real].pow(2).mean()
        return error

    _fit(block.self_attn, lost, *ATTENTION_FIT)


def _fit_mixture(mixture: Mixture, layers: Sequence[Layers]) -> None:
    """Let a mixture give what the dense layer gives; its experts are kept about evenly busy."""
    x_ND, y_ND = (torch.cat([one.feed_forward[i][one.real] for one in layers]) for i in (0, 1))
    scale = y_ND.pow(2).mean()

    def lost(step: int) -> Tensor:
        some = torch.randint(len(x_ND), (FIT_TOKENS,))
        h_BND = x_ND[some][None]
        context = Context((h_BND, h_BND), None, torch.zeros(1, FIT_TOKENS, dtype=torch.bool))
        with load_balance(mixture) as balances:
            z_BND = mixture(h_BND, context, nn.Identity()) - h_BND
        error: Tensor = (z_BND[0] - y_ND[some]).pow(2).mean() / scale
        return error + BALANCE * balances[0]

    _fit(mixture, lost, *MIXTURE_FIT)


def _fit(module: nn.Module, lost: Callable[[int], Tensor], steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        lost(step).backward()
        optimizer.step()


def _copy(to: nn.Module, source: nn.Module) -> None:
    for new, old in zip(to.parameters(), source.parameters(), strict=True):
        new.copy_(old)


def _copy_attention(block: PreNormBlock, old: BlockSites, layers: Sequence[Layers]) -> None:
    new = block.sites()
    for site, norm in new.norms.items():
        _copy(norm, old.norms[site])
    width, times = old.attention.head_dim, new.attention.n_heads // old.attention.n_heads
    query, out = old.linears[Role.Q].weight, old.linears[Role.OUT].weight
    repeated = query.unflatten(0, (-1, width)).repeat_interleave(times, 0).flatten(0, 1)
    noise = APART * query.std() * torch.randn(repeated.shape) if times > 1 else 0.0
    new.linears[Role.Q].weight.copy_(repeated + noise)
    new.linears[Role.OUT].weight.copy_(out.unflatten(1, (-1, width)).repeat_interleave(times, 1).flatten(1) / times)
    for role in (Role.K, Role.V):
        new.linears[role].weight.copy_(old.linears[role].weight)
    norms = block.self_attn.head_norms
    assert norms is not None  # of SDAR and LLaDA-MoE
    queries_and_keys = [one.query[one.real] for one in layers], [one.key[one.real] for one in layers]
    for norm, heads in zip(norms, queries_and_keys, strict=True):
        norm.weight.fill_(float(torch.cat(heads).unflatten(-1, (-1, width)).pow(2).mean(-1).sqrt().mean()))


def _copy_feed_forward(block: PreNormBlock, old: BlockSites) -> None:
    gate, up, down = (old.linears[role].weight for role in (Role.GATE, Role.UP, Role.DOWN))
    experts = list(block.sites().experts.values())
    if not experts:
        experts, scale = [block.mlp], 1.0
    else:
        scale = float(len(experts))  # what a router that knows nothing yet divides by
    order = torch.randperm(len(gate)) if len(experts) > 1 else torch.arange(len(gate))
    for index, expert in enumerate(experts):
        assert isinstance(expert, Expert)
        begin = index * len(gate) // len(experts)
        part = order.roll(-begin)[: expert.gate_proj.out_features]
        expert.gate_proj.weight.copy_(gate[part])
        expert.up_proj.weight.copy_(up[part])
        expert.down_proj.weight.copy_(scale * down[:, part])
