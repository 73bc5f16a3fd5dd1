"""Packed checkpoints: written, described, read by transformers, completed from.

Importing this package lets transformers' Auto classes load the model families and the packed format:

    import starquant.packed
    from transformers import AutoModel

    model = AutoModel.from_pretrained(DIR)
"""

from starquant.packed import plugin as _registers  # noqa: F401
from starquant.packed.tuned import use_tuned

use_tuned()
