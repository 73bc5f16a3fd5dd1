"""What a site's transform P starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.config.methods.star_quant import STaRQuantOptions
from starquant.methods.fitted import Fitted
from starquant.models.roles import BlockSites, Site, SiteKey
from starquant.numerics import hadamard_matrix, has_hadamard, kronecker_sizes
from starquant.numerics.hadamard import random_signs


def start_of(sites: BlockSites, site: SiteKey, options: STaRQuantOptions, fitted: Fitted) -> tuple[list[Tensor], str]:
    """Return what a site's matrix starts from, and "dense", "kronecker" or "fixed" (nothing of its own).

    Sites behind a norm start from the identity where the residual rotation stands before it, and from Hadamard matrices
    with random signs where there is none. The others start from Hadamard matrices, across heads or of the whole width,
    where these exist.
    """
    width = sites.width(site)
    transform = options.transform
    shared = transform.structure == "shared" and (site in sites.norms or transform.sites == "residual")
    if transform.fit == "fixed" or shared:
        return [], "fixed"
    structure = transform.structure_of(width)
    sizes = (sites.attention.n_heads, sites.attention.head_dim) if site is Site.OUT else kronecker_sizes(width)
    behind_norm = site in sites.norms and options.residual_rotation == "none"
    online = {Site.OUT: (options.out_hadamard, False), Site.DOWN: (options.down_hadamard, options.down_hadamard)}
    hadamards = online.get(site.kind, (behind_norm, behind_norm))
    whole = (site.kind is Site.DOWN and options.down_hadamard) or behind_norm
    generator = torch.Generator().manual_seed(options.rotation_seed)

    def factor(n: int, wanted: bool) -> Tensor:
        if not (wanted and has_hadamard(n)):
            return torch.eye(n, dtype=torch.float64)
        hadamard_NN = hadamard_matrix(n)
        return random_signs(n, generator).double()[:, None] * hadamard_NN if behind_norm else hadamard_NN

    if structure == "dense" and whole and has_hadamard(width):
        return [factor(width, True)], structure
    factors = [factor(n, wanted) for n, wanted in zip(sizes, hadamards, strict=True)]
    if structure == "kronecker":
        for n, wanted in zip(sizes, hadamards, strict=True):
            if wanted and not has_hadamard(n):
                fitted.note(f"no Hadamard matrix of size {n}: the factor starts from the identity", site.value)
        return factors, structure
    return [torch.kron(*factors)], structure
