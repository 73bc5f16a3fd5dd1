"""How soon do `--help`, `--cfg job` and a typing error answer? Wall seconds of whole processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from measure import alternate, machine

RUN = Path(__file__).resolve().parent.parent / "run.py"


def main() -> None:
    """Print the median of nine runs of each command line."""
    lines = ("--help", "--cfg job", "--cfg job model=llada bits=w8a8", "bits=w5a5")

    def call(line: str) -> None:
        subprocess.run([sys.executable, str(RUN), *line.split()], capture_output=True, env=dict(os.environ))

    medians = alternate({line: lambda line=line: call(line) for line in lines}, repeats=9, warmup=1)
    print(machine())
    for line, seconds in medians.items():
        print(f"run.py {line:40s} {seconds:5.2f} s")


if __name__ == "__main__":
    main()
