"""Train a delta: `python -m starquant.testbed.smol.training --text DIR --out DELTA_DIR`.

Turns the pretrained model into a masked-diffusion model by low-rank updates, on natural text and on the tasks' training
items. The schedule goes by steps: on one machine and thread count a seed gives one delta (on a GPU up to the order in
which its kernels add), and a training that was stopped, by --minutes or by force, goes on from its last saved step when
it is called again with the same arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from starquant.errors import ConfigError, one_line_errors, user_path
from starquant.testbed.smol.training.loop import Training
from starquant.testbed.smol.training.options import DTYPES, Options, validate_options
from starquant.testbed.smol.training.packing import SHARES, shares_with
from starquant.testbed.smol.training.state import LOG

CUDA_WORKERS = 4


def parse_share(words: str) -> tuple[str, float]:
    """Read NAME=SHARE; raises ConfigError."""
    name, _, share = words.partition("=")
    try:
        return name, float(share)
    except ValueError:
        raise ConfigError(f"--share {words}: allowed: NAME=SHARE, NAME one of {', '.join(SHARES)}") from None


def new_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(prog="python -m starquant.testbed.smol.training", description=__doc__)
    add = parser.add_argument
    add("--out", type=user_path, required=True, help="folder of the delta, and of the training's state and log")
    add("--text", type=user_path, help='folder of natural text: .txt files, and .jsonl files of lines {"text": "..."}')
    add("--share", action="append", default=[], metavar="NAME=SHARE", help=f"share of the tokens (default: {SHARES})")
    add("--tokens", type=int, default=Options.tokens, help="of the whole training, padding included (default 110 M)")
    add("--minutes", type=float, help="stop this call after so long; its delta is there, the same call goes on")
    add("--batch", type=int, default=Options.batch, help="rows of 256 tokens in a step (default 128; take 4 on a CPU)")
    add("--rank", type=int, default=Options.rank, help="of the low-rank updates (default 32)")
    add("--learning-rate", type=float, default=Options.learning_rate, help="peak (default 2e-3)")
    add("--seed", type=int, default=0, help="of the factors, the rows and the masks")
    add("--layers", type=int, help="keep only the first layers of the pretrained model, for a trial")
    add("--from", dest="start", type=user_path, metavar="DELTA_DIR", help="go on from a delta in place of a fresh one")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--dtype", choices=sorted(DTYPES), default=Options.dtype, help="of frozen weights and the pass")
    add("--workers", type=int, help=f"processes that pack rows ahead (default: {CUDA_WORKERS} on cuda, 0 on a CPU)")
    add("--save-every", type=int, default=Options.save_every, help="steps between saved states (default 200)")
    add("--log-every", type=int, default=Options.log_every, help=f"steps between lines of {LOG} (default 20)")
    add("--validate-every", type=int, default=Options.validate_every, help="steps between held-out losses (400)")
    add("--base", type=user_path, help="the pretrained model's file; by default the cached or fetched one")
    return parser


@one_line_errors(OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or go on training; returns 2 after bad input."""
    named = vars(new_parser().parse_args(arguments))
    named["shares"] = shares_with(dict(parse_share(words) for words in named.pop("share")))
    if named["workers"] is None:
        named["workers"] = CUDA_WORKERS if named["device"].startswith("cuda") else 0
    file = named.pop("base")
    options = Options(**named)
    validate_options(options)  # before the base is fetched and read
    from starquant.testbed.smol.base import find_base, read_base
    from starquant.testbed.smol.delta import read_delta
    from starquant.testbed.smol.tokenizer import read_tokenizer

    start = None if options.start is None else read_delta(options.start)
    path = find_base() if file is None else find_base(file)
    training = Training(options, read_base(path), read_tokenizer(path), start=start)
    if training.go_on():
        print(f"{options.out}: the delta of {training.steps} steps")
    else:
        print(f"{options.out}: stopped after step {training.step} of {training.steps}; the same call goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
