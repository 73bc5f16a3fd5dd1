"""Per-channel scaling of a site, folded exactly into its producer; shared by SmoothQuant and AWQ.

Shape suffixes: D width of the site, K key/value heads, E head width.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from starquant.models.roles import BlockSites, Role, Site, SiteKey
from starquant.quantized import rewriting


def scale_names(site: SiteKey) -> str:
    """Return the name of a site's scale among a block's tensors."""
    return f"{site.value}.scale"


def producer(sites: BlockSites, site: SiteKey) -> nn.Module:
    """Return the module whose output is what the site sees, up to what commutes with a scale per channel."""
    if site in sites.norms:
        return sites.norms[site]
    reader = next(iter(sites.readers(site)))
    return sites.linears[reader.beside({Site.OUT: Role.V, Site.DOWN: Role.UP}[site.kind])]


def group_channels(sites: BlockSites, site: SiteKey, values_D: Tensor, reduce: str) -> Tensor:
    """Make values equal for channels that the producer cannot tell apart: heads that share one value head (GQA)."""
    attention = sites.attention
    groups = attention.n_heads // attention.n_kv_heads
    if site is not Site.OUT or groups == 1:
        return values_D
    heads = values_D.unflatten(0, (attention.n_kv_heads, groups, attention.head_dim))
    shared: Tensor = getattr(heads, reduce)(1, keepdim=True)
    return shared.expand_as(heads).flatten()


def apply_scales(sites: BlockSites, tensors: dict[str, Tensor]) -> None:
    """Divide each scaled site's producer by its scale and multiply its linears, in place."""
    scales = {site: tensors[scale_names(site)] for site in sites.inputs if scale_names(site) in tensors}
    if not scales:
        return
    with rewriting.rounded_once(sites):
        for site, scale_D in scales.items():
            made_by = producer(sites, site)
            linears = sites.behind_norm(site)
            scale_D = scale_D.to(linears[0].weight.device)
            rewriting.scale_input(linears, scale_D)
            if site in sites.norms:
                rewriting.divide_gain(made_by, scale_D)
            else:
                rewriting.divide_output(cast(nn.Linear, made_by), of_producer(sites, site, scale_D))


def of_producer(sites: BlockSites, site: SiteKey, scale_D: Tensor) -> Tensor:
    """Return the scale of the producer's own outputs: one a value head where query heads share it."""
    attention = sites.attention
    if site is not Site.OUT or attention.n_heads == attention.n_kv_heads:
        return scale_D
    groups = attention.n_heads // attention.n_kv_heads
    heads: Tensor = scale_D.unflatten(0, (attention.n_kv_heads, groups, attention.head_dim))
    return heads[:, 0].flatten()
