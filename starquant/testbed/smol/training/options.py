"""What a training of a delta is called with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from starquant.errors import ConfigError
from starquant.testbed.smol.training.packing import LENGTH, NATURAL, SHARD_ROWS, SHARES
from starquant.testbed.smol.training.state import CARD

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
#: Half of the base's width: beyond, two factors are larger than the square matrices that they update.
MOST_RANK = 288


@dataclass(frozen=True)
class Options:
    """What a training is called with.

    Attributes:
        out: folder of its state, its log and the delta.
        text: folder of natural text; None where its share is 0.
        layers: of the pretrained model, from the first on; None for all.
        minutes: after which this call stops; None for never.
        start: folder of a delta to go on from; None for a fresh one.
        shard_rows: rows packed at once.
    """

    out: Path
    text: Path | None = None
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)
    tokens: int = 110_000_000
    batch: int = 128
    rank: int = 32
    learning_rate: float = 2e-3
    seed: int = 0
    layers: int | None = None
    minutes: float | None = None
    start: Path | None = None
    device: str = "cpu"
    dtype: str = "bfloat16"
    workers: int = 0
    save_every: int = 200
    log_every: int = 20
    validate_every: int = 400
    shard_rows: int = SHARD_ROWS

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return -(-self.tokens // (self.batch * LENGTH))


def validate_options(options: Options) -> None:
    """Judge what a training is called with; raises ConfigError."""
    least = ("tokens", "batch", "rank", "layers", "save_every", "log_every", "validate_every")
    for name in least:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: got {value}, allowed: 1 or more")
    for name in ("learning_rate", "minutes"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"--{name.replace('_', '-')}: got {value:g}, allowed: above 0")
    if options.workers < 0:
        raise ConfigError(f"--workers: got {options.workers}, allowed: 0 or more")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(f"--device {options.device}: there is no such device here; allowed: cpu, cuda") from None
    if options.rank > MOST_RANK:
        raise ConfigError(f"--rank: got {options.rank}, allowed: at most {MOST_RANK}")
    natural = options.shares[NATURAL]
    if options.text is None and natural > 0:
        raise ConfigError(
            f"--text: is missing, and {natural:.0%} of the tokens are natural text; name a folder of it, or leave it "
            "out with --share natural=0"
        )
    if options.text is not None and not options.text.is_dir():
        raise ConfigError(f"--text {options.text}: no such folder")
    if options.text is not None and not natural:
        raise ConfigError("--text: would not be read with --share natural=0; leave one of them out")
    if (options.out / CARD).exists():
        raise ConfigError(f"--out {options.out}: holds a finished training ({CARD}); use another folder")
