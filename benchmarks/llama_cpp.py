"""llama.cpp on F16, Q8_0 and Q4_0 of one model: tokens a second of a denoising step, memory, load time.

    python benchmarks/llama_cpp.py F16.gguf                 a model's 16-bit file; the others are made of it
    python benchmarks/llama_cpp.py --llada LAYERS           random weights of LLaDA-8B's shape, so many of its 32 blocks

Each file has a process of its own. Lengths and files take turns, so that what else the machine does hits all alike; the
median over rounds is shown. Files are made by llama.cpp's quantizer: its speed does not depend on the codes.
"""

from __future__ import annotations

# ruff: noqa: E402
import sys

del sys.path[0]  # this folder, whose file of that name would hide the package

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from starquant.llama_cpp.engine import Engine
from starquant.llama_cpp.quantizer import quantize_file
from starquant.llama_cpp.writing import write_gguf
from starquant.models import load_tokenizer
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.testbed.tiny.shipped import weights_folder

LENGTHS = (64, 128, 256)


def random_llada(path: Path, layers: int) -> None:
    """Write random float16 weights of LLaDA-8B's widths."""
    config = LLaDAConfig(n_layers=layers, mlp_hidden_size=12288, vocab_size=126464, n_kv_heads=32)
    with torch.device("meta"):
        model = LLaDAModelLM(config).half()
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    write_gguf(model, load_tokenizer(weights_folder(0)), path, "F16")


def resident(what: str) -> int:
    """Return the bytes of this process that lie in memory (VmRSS), or did at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def serve(path: Path, lengths: list[int], threads: int, repack: bool) -> None:
    """Load a file, say what that took, then time a step of every length that is read."""
    torch.set_num_threads(threads)
    before, began = resident("VmRSS"), time.perf_counter()
    engine = Engine(path, max(lengths), threads, repack=repack)
    load_s = time.perf_counter() - began
    ids = torch.randint(0, engine.vocabulary, (max(lengths),), generator=torch.Generator().manual_seed(0))
    for length in lengths:
        engine.logits(ids[:length])
    print(json.dumps({"load_s": load_s}), flush=True)
    for line in sys.stdin:
        length = int(line)
        began = time.perf_counter()
        engine.logits(ids[:length])
        grown = resident("VmHWM") - before
        print(json.dumps({"seconds": time.perf_counter() - began, "peak": grown}), flush=True)


def measure(files: dict[str, Path], lengths: list[int], rounds: int, threads: int, repack: bool) -> None:
    """Print the table."""
    served, loads = {}, {}
    for kind, path in files.items():
        words = [sys.executable, __file__, "--serve", str(path), "--threads", str(threads)]
        words += ["--lengths", *map(str, lengths), *(["--repack"] if repack else [])]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        loads[kind], served[kind] = json.loads(process.stdout.readline())["load_s"], process
    seconds: dict[tuple[str, int], list[float]] = {}
    peaks: dict[str, int] = {}
    for _ in range(rounds):
        for length in lengths:
            for kind, process in served.items():
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(f"{length}\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                seconds.setdefault((kind, length), []).append(answer["seconds"])
                peaks[kind] = answer["peak"]
    for process in served.values():
        process.communicate()
    print(f"{threads} threads, {rounds} rounds, weights {'laid out anew' if repack else 'as in the file'}")
    print("| file | MB | load, s | peak, MB | " + " | ".join(f"tokens/s at {n}" for n in lengths) + " |")
    print("|---" * (4 + len(lengths)) + "|")
    for kind, path in files.items():
        speeds = [length / statistics.median(seconds[kind, length]) for length in lengths]
        columns = " | ".join(f"{speed:.0f}" if speed >= 20 else f"{speed:.2f}" for speed in speeds)
        size, peak = path.stat().st_size / 1e6, peaks[kind] / 1e6
        print(f"| {kind} | {size:,.0f} | {loads[kind]:.2f} | {peak:,.0f} | {columns} |")


def main() -> None:
    """Make the files and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--llada", type=int, metavar="LAYERS")
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repack", action="store_true", help="as llama.cpp's own programs do")
    parser.add_argument("--work", type=Path, help="where files are made; a temporary folder by default")
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.lengths, options.threads, options.repack)
        return
    if (options.file is None) == (options.llada is None):
        parser.error("give a file, or --llada")
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        source = options.file or Path(work) / "f16.gguf"
        if options.llada is not None:
            random_llada(source, options.llada)
        files = {"F16": source}
        for kind in ("q8_0", "q4_0"):
            files[kind.upper()] = Path(work) / f"{kind}.gguf"
            quantize_file(source, files[kind.upper()], kind, threads=options.threads)
        measure(files, options.lengths, options.rounds, options.threads, options.repack)


if __name__ == "__main__":
    main()
