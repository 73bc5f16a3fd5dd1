"""Peak memory of loading a sharded checkpoint: never two copies of the weights.

Peak resident memory counts pages of the mapped file as well, so that of anonymous memory (what cannot be dropped)
is shown beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from starquant.models.llada import LLaDAConfig, LLaDAModelLM

CHILD = """
import sys, threading, time
from starquant.models import load_model

def read():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith("Rss"))
    return {k: int(v.split()[0]) / 1024 for k, v in fields.items()}

peak = {}
done = threading.Event()
def watch():
    while not done.is_set():
        for k, v in read().items():
            peak[k] = max(peak.get(k, 0), v)
        time.sleep(0.002)

before = read()
thread = threading.Thread(target=watch); thread.start()
began = time.perf_counter()
model = load_model(sys.argv[1], dtype=sys.argv[2])
seconds = time.perf_counter() - began
total = sum(p.sum().item() for p in model.parameters())  # touch every weight
done.set(); thread.join()
anonymous = peak["RssAnon"] - before["RssAnon"]
resident = anonymous + peak["RssFile"] - before["RssFile"]
print(f"{seconds:.2f} {anonymous:.0f} {resident:.0f}")
"""


def main() -> None:
    """Print peaks for loading as stored and converted to another dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    sizes = {"d_model": 2048, "n_heads": 16, "n_layers": arguments.layers, "mlp_hidden_size": 6144, "vocab_size": 8192}
    with tempfile.TemporaryDirectory() as folder:
        torch.set_default_dtype(torch.bfloat16)
        model = LLaDAModelLM(LLaDAConfig(**sizes, mask_token_id=1))
        count = sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder, max_shard_size="300MB")
        del model
        shards = len(list(Path(folder).glob("*.safetensors")))
        print(f"{count / 1e6:.0f} M parameters stored in bfloat16, {shards} shards")
        for dtype, width in (("bfloat16", 2), ("float32", 4)):
            done = subprocess.run(
                [sys.executable, "-c", CHILD, folder, dtype], capture_output=True, text=True, check=True
            )
            seconds, anonymous, resident = done.stdout.split()[-3:]
            weights = count * width / 2**20
            print(f"as {dtype}: weights {weights:.0f} MiB, loaded in {seconds} s")
            for what, peak in (("anonymous", anonymous), ("with mapped file pages", resident)):
                print(f"  peak {what}: {peak} MiB, {float(peak) / weights:.2f}x")


if __name__ == "__main__":
    main()
