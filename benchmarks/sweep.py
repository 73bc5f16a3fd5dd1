"""Sweeps: an 8-cell sweep against eight separate cold runs, and the same sweep again when everything is there.

Embedded model, 4 methods x 2 bit-widths, testbed tasks. Separate runs have a results folder each, as on eight days.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import machine

REPOSITORY = Path(__file__).resolve().parents[1]
METHODS = ("rtn", "smoothquant", "awq", "quarot")
BITS = ("w4a4", "w8a8")


def run(*arguments: str, results: Path) -> float:
    """Return the seconds of one command."""
    command = [sys.executable, str(REPOSITORY / "run.py"), *arguments, f"paths.results={results}"]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"CI": "1"})
    return time.perf_counter() - began


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", help="items a task, to try it out")
    options = parser.parse_args()
    more = [] if options.limit is None else [f"tasks.limit={options.limit}"]
    print(machine())
    sweep = ("-m", f"method={','.join(METHODS)}", f"bits={','.join(BITS)}", *more)
    with tempfile.TemporaryDirectory() as folder:
        together = run(*sweep, results=Path(folder) / "sweep")
        again = run(*sweep, results=Path(folder) / "sweep")
        apart = [
            run(f"method={method}", f"bits={bits}", *more, results=Path(folder) / f"{method}-{bits}")
            for method, bits in itertools.product(METHODS, BITS)
        ]
    print(f"eight cold runs: {sum(apart):.1f} s ({min(apart):.1f} to {max(apart):.1f} each)")
    print(f"one sweep of eight cells: {together:.1f} s, {together / sum(apart):.2f} of it")
    print(f"the same sweep again: {again:.1f} s")


if __name__ == "__main__":
    main()
