"""A random checkpoint of a family's true shape through the whole path, every stage a process of its own.

    .venv/bin/python benchmarks/true_size.py llada --layers 2 --methods rtn quarot star_quant --work /tmp/true_size
    .venv/bin/python benchmarks/true_size.py dream --layers 28 --methods rtn --blocks disk --work DIR --out dream.csv
    .venv/bin/python benchmarks/true_size.py llada2_mini --layers 3 --methods rtn quarot_rtn --blocks disk --work DIR

Stages: make (written shard by shard, once), score full precision, calibrate, quantize and score (one likelihood item,
one short generation), export, load the export and run it. Of each: wall and CPU seconds, and the peak of private memory
(RssAnon: what is mapped from files is not counted), looked at 20 times a second from outside; on a GPU its peak too.
The weights are noise of a sane size and the tokenizer is the embedded model's: costs are true, scores mean nothing.
It does not begin where disk or memory will not do, and stops a stage before the machine runs out of memory.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from safetensors.torch import save_file

from starquant.errors import DeviceError, one_line_errors
from starquant.models.base import MaskedDiffusionModel
from starquant.models.dream import DREAM
from starquant.models.family import Family
from starquant.models.fused import fuse_shapes
from starquant.models.llada import LLADA
from starquant.models.llada2 import LLADA2
from starquant.testbed.tiny.shipped import weights_folder

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "tests" / "golden" / "real_configs"
#: Family; its real configuration, or what of it is not the class's default; what it calls its depth.
FAMILIES: dict[str, tuple[Family, str | dict[str, Any], str]] = {
    "llada": (LLADA, "llada_8b_base", "n_layers"),
    "dream": (DREAM, "dream_v0_instruct_7b", "num_hidden_layers"),
    "llada2_mini": (LLADA2, {"num_key_value_heads": 4}, "num_hidden_layers"),
}
SAMPLERS = {
    "llada": "{name: llada, gen_length: 8, steps: 2, block_length: 8}",
    "dream": "{name: dream, max_new_tokens: 8, steps: 2, alg: entropy, temperature: 0.0}",
    "llada2_mini": "{name: llada2, gen_length: 32, block_length: 32, steps_per_block: 2}",
}
TOKENS = ("mask_token_id", "eos_token_id", "pad_token_id")  # of the embedded model's tokenizer
SPARE = 1.5e9  # bytes that are left to the machine
FORWARD = """
import sys, torch, starquant.packed
from starquant.models import load_model
model = load_model(sys.argv[1], device=sys.argv[2])
with torch.inference_mode():
    model(torch.randint(2, 300, (1, 64), device=sys.argv[2]), logit_positions=(torch.tensor([0]), torch.tensor([0])))
"""


@dataclass(frozen=True)
class Stage:
    """What a stage took.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of all threads.
        private_gb: peak of anonymous memory, 1e9 bytes.
        gpu_gb: peak of the device's memory in use; None without a GPU.
    """

    family: str
    layers: int
    method: str
    stage: str
    seconds: float
    cpu_seconds: float
    private_gb: float
    gpu_gb: float | None


def skeleton(name: str, layers: int) -> MaskedDiffusionModel:
    """Return a model of the true shape and so many layers on the meta device."""
    family, config, depth = FAMILIES[name]
    settings = config if isinstance(config, dict) else json.loads((CONFIGS / config / "config.json").read_text("utf-8"))
    words = json.loads((weights_folder(0) / "config.json").read_text(encoding="utf-8"))
    settings = settings | {depth: layers, "dtype": "bfloat16"} | {key: words[key] for key in TOKENS}
    with torch.device("meta"):
        return family.model(family.config(**settings))


def make(name: str, layers: int, folder: Path) -> Path:
    """Write the checkpoint, one shard a block; what is there already stays."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    model = skeleton(name, layers)
    shapes = fuse_shapes({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}, model.fused)
    size = 2 * sum(math.prod(shape) for shape in shapes.values())
    folder.mkdir(parents=True, exist_ok=True)
    validate_disk(folder, 1.05 * size)
    prefixes = [model.block_name(index) + "." for index in range(layers)]
    generator, where = torch.Generator().manual_seed(0), dict[str, str]()
    for number, prefix in enumerate([*prefixes, ""]):
        mine = [k for k in shapes if (k.startswith(prefix) if prefix else not k.startswith(tuple(prefixes)))]
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file({key: _noise(key, shapes[key], generator) for key in mine}, folder / file)
        where |= dict.fromkeys(mine, file)
    model.config.save_pretrained(folder)
    for path in weights_folder(0).glob("*token*.json"):
        shutil.copyfile(path, folder / path.name)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _noise(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return weights whose products keep the size of their inputs; gains are ones."""
    if len(shape) == 1:
        return (torch.ones if "norm" in name or "ln_f" in name else torch.zeros)(shape, dtype=torch.bfloat16)
    spread = 1 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, spread, generator=generator)


def validate_disk(folder: Path, needed: float) -> None:
    """Raise DeviceError where the disk has less."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DeviceError(f"--work: {folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def watched(command: Sequence[str], stage: str, log: Path) -> tuple[float, float, float, float | None]:
    """Run a process; return its wall and CPU seconds and its peaks of private and of GPU memory in GB.

    Raises:
        DeviceError: it failed, or was stopped because memory ran short.
    """
    private, gpu, cpu, began = 0.0, 0.0, 0.0, time.perf_counter()
    with log.open("w", encoding="utf-8") as text:
        process = subprocess.Popen(command, stdout=text, stderr=subprocess.STDOUT, cwd=ROOT)
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                private = max(private, _private_bytes(process.pid))
                times = seen.cpu_times()
                cpu = times.user + times.system
            except (psutil.Error, OSError, ValueError):  # it has just ended
                break
            gpu = max(gpu, _gpu_bytes())
            if psutil.virtual_memory().available < SPARE:
                process.kill()
                process.wait()
                raise DeviceError(f"{stage}: stopped at {private / 1e9:.1f} GB: memory runs short")
            time.sleep(0.05)
        if process.wait():
            last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
            raise DeviceError(f"{stage}: failed: {' '.join(last)} (all of it in {log})")
    used = gpu / 1e9 if torch.cuda.is_available() else None
    return time.perf_counter() - began, cpu, private / 1e9, used


def _private_bytes(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return 1024.0 * int(line.split()[1])
    raise ValueError("no RssAnon")


def _gpu_bytes() -> float:
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return float(total - free)


def stages(args: argparse.Namespace, method: str, model: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the command of every stage of a method."""
    results, packed = args.work / "results", args.work / "packed" / f"{args.family}-{args.layers}-{method}"
    sampler = SAMPLERS[args.family]
    words = [sys.executable, str(ROOT / "run.py"), f"model={args.family}", f"model.path={model}", f"bits={args.bits}"]
    words += [
        "model.chat_template=none",
        "calibration=testbed",
        "fidelity=none",
        "tasks.names=[testbed_facts,testbed_arithmetic]",
        "tasks.limit=1",
    ]
    words += ["+model.protocol.testbed_facts={mc_num: 16}"]
    words += [f"+model.protocol.testbed_arithmetic={{sampler: {sampler}}}"]
    words += [f"paths.results={results}", f"runtime.device={args.device}", f"runtime.blocks={args.blocks}"]
    words += [*([] if args.threads is None else [f"runtime.threads={args.threads}"]), *args.overrides]
    if method == "none":
        yield "score", [*(word for word in words if not word.startswith("method.")), "method=none"]
        return
    yield "calibrate", [*words, f"method={method}", "stage=calibrate"]
    yield "quantize and score", [*words, f"method={method}"]
    shutil.rmtree(packed, ignore_errors=True)
    yield "export", [*words, f"method={method}", f"export.dir={packed}"]
    yield "load and run the export", [sys.executable, "-c", FORWARD, str(packed), args.device]
    shutil.rmtree(packed, ignore_errors=True)


@one_line_errors(OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a stage; write them all to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("overrides", nargs="*", help="more overrides of run.py, such as calibration.source.segments=8")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["rtn"])
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--blocks", choices=("auto", "memory", "disk"), default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint, results and exports")
    parser.add_argument("--out", type=Path, help="CSV")
    args = parser.parse_intermixed_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    model = make(args.family, args.layers, args.work / f"{args.family}-{args.layers}")
    rows = []
    for method in ["none", *(name for name in args.methods if name != "none")]:
        for stage, command in stages(args, method, model):
            log = args.work / f"{args.family}-{args.layers}-{method}-{stage.replace(' ', '_')}.log"
            row = Stage(args.family, args.layers, method, stage, *watched(command, f"{method} {stage}", log))
            rows.append(row)
            device = "" if row.gpu_gb is None else f", {row.gpu_gb:.2f} GB on the GPU"
            figures = f"{row.seconds:8.1f} s, {row.cpu_seconds:8.1f} CPU s, {row.private_gb:6.2f} GB private{device}"
            print(f"{method:24s} {stage:24s} {figures}", flush=True)
            if args.out is not None:
                pd.DataFrame(map(asdict, rows)).to_csv(args.out, index=False, float_format="%.3f")
    return 0


if __name__ == "__main__":
    sys.exit(main())
