"""An embedded model with stronger outlier channels: `python -m starquant.testbed.tiny.outliers --out DIR`.

In every block some value channels and feed-forward channels grow by a factor, and what reads them shrinks by it.
The attention output and the input of the down projection then have outlier channels for every token, as those of large
models do; what the model computes is unchanged. Run on it with `model.seed=null model.path=DIR`.
"""

from __future__ import annotations

import argparse

import torch

from starquant.errors import user_path
from starquant.models import load_model, load_tokenizer
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Role
from starquant.testbed.tiny.shipped import shipped_seeds, weights_folder


def strengthen(model: MaskedDiffusionModel, factor: float, channels: int) -> None:
    """Multiply the first `channels` values of every key/value head and feed-forward channels, in place.

    Args:
        model: rewritten; its function is unchanged up to rounding.
        factor: by which the channels grow; a power of two rounds nothing.
        channels: of each head, and as many feed-forward channels a block.
    """
    for block in model.trunk().blocks:
        sites = model.block_sites(block)
        attention, linears = sites.attention, sites.linears
        value = torch.arange(attention.head_dim) < channels
        hidden = torch.arange(linears[Role.DOWN].in_features) < channels
        pairs = (
            (Role.V, Role.OUT, value.repeat(attention.n_kv_heads), value.repeat(attention.n_heads)),
            (Role.UP, Role.DOWN, hidden, hidden),
        )
        with torch.no_grad():
            for writer, reader, written_O, read_I in pairs:
                linears[writer].weight[written_O] *= factor
                if linears[writer].bias is not None:
                    linears[writer].bias[written_O] *= factor
                linears[reader].weight[:, read_I] /= factor


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, choices=shipped_seeds(), help="of the embedded model")
    parser.add_argument("--factor", type=float, default=16.0)
    parser.add_argument("--channels", type=int, default=1, help="of every head, and of every block's feed-forward")
    parser.add_argument("--out", type=user_path, required=True, help="folder for the checkpoint")
    args = parser.parse_args()
    model = load_model(weights_folder(args.seed))
    strengthen(model, args.factor, args.channels)
    model.save_pretrained(args.out)
    load_tokenizer(weights_folder(args.seed)).save_pretrained(args.out)


if __name__ == "__main__":
    main()
