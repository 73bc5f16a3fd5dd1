"""`python run.py model=llada bits=w4a4`: the command line of `starquant.sweeps.command_line`."""

import os
import sys

if not sys.stderr.isatty() or os.environ.get("CI"):
    os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is imported: lm-eval's bars too

from starquant.sweeps.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
