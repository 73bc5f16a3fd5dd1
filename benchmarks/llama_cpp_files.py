"""What llama.cpp's own quantizer gives of a model, with and without an importance matrix, and the table beside ours.

    python benchmarks/llama_cpp_files.py make FOLDER OVERRIDE...   F16, and llama.cpp's own files of it
    python benchmarks/llama_cpp_files.py score FOLDER OVERRIDE...  every GGUF of the folder, by llama.cpp
    python benchmarks/llama_cpp_files.py table FOLDER OVERRIDE...  from the records: FOLDER/table.csv, and in words

OVERRIDE as of run.py: model=smol model.dtype=float32 tasks=fidelity paths.results=results ...
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

del sys.path[0]  # this folder, one of whose files would hide the package llama_cpp

import csv
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf

from starquant.calibration.masked_states import make_states
from starquant.calibration.site_statistics import Collect
from starquant.calibration.walk import walk
from starquant.config.run import RunSpec
from starquant.llama_cpp.architecture import linear_tensor
from starquant.llama_cpp.quantizer import quantize_file
from starquant.llama_cpp.reading import describe_gguf
from starquant.llama_cpp.writing import write_gguf
from starquant.models import family_of
from starquant.runs.execute import execute
from starquant.runs.inputs import pin
from starquant.session.session import Session
from starquant.store.records import RecordStore

OWN = ("q8_0", "q4_0", "q4_k_m")
CONF = Path(__file__).resolve().parent.parent / "conf"


def spec_of(overrides: list[str]) -> RunSpec:
    """Compose and validate a run, as the command line does."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", overrides=overrides)
    return RunSpec.from_config(OmegaConf.to_container(composed, resolve=True))  # type: ignore[arg-type]


def importance(overrides: list[str]) -> dict[str, torch.Tensor]:
    """Return E[x^2] of what every linear reads on the calibration's masked states, by the name of its tensor."""
    inputs = pin(spec_of([*overrides, "method=gptq", "bits=q4_0"]))
    loaded, spec = inputs.load("cpu"), inputs.spec
    assert loaded.texts.calibration is not None
    model = loaded.model
    sampler = family_of(model).make_sampler(spec.model.trajectory)
    bos = family_of(model).bos_token_id(loaded.tokenizer)
    states = make_states(loaded.texts.calibration, spec.calibration, model, sampler, bos=bos)
    seen: dict[str, torch.Tensor] = {}
    for visit in walk(model, states):
        for site, statistics in visit.collect(Collect()).items():
            moments = statistics.moments()
            for role in visit.sites.readers(site):
                seen[f"{linear_tensor(visit.index, role)}.weight"] = moments.variance + moments.mean.square()
    return seen


def make(folder: Path, overrides: list[str]) -> None:
    """Write what is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "f16.gguf"
    if not source.exists():
        inputs = pin(spec_of([*overrides, "method=gptq", "bits=q4_0"]))
        loaded = inputs.load("cpu")
        print(source, write_gguf(loaded.model, loaded.tokenizer, source, "F16", {"name": inputs.spec.model.name}))
    for kind in OWN:
        if not (target := folder / f"llama_cpp-{kind}.gguf").exists():
            print(target, quantize_file(source, target, kind))
    if all((folder / f"llama_cpp_imatrix-{kind}.gguf").exists() for kind in OWN[1:]):
        return
    matrix = importance(overrides)
    for kind in OWN[1:]:
        target = folder / f"llama_cpp_imatrix-{kind}.gguf"
        print(target, quantize_file(source, target, kind, matrix))


def run_of(path: Path, overrides: list[str]) -> list[str]:
    """Return the words of the run that scores a file."""
    name = path.stem.replace("-", "_").replace(".", "_")
    return [*overrides, "model.engine=llama_cpp", f"model.path={path}", "method=gguf", f"method.name=gguf_{name}"]


def score(folder: Path, overrides: list[str]) -> None:
    """Score every file of the folder; what is recorded is not computed again, full precision is read once."""
    session = Session.open()
    for path in sorted(folder.glob("*.gguf")):
        result = execute(spec_of(run_of(path, overrides)), session)
        assert result.record is not None
        print(
            path.stem, {f"{s.task} {s.metric}": s.value for s in result.record.scores if s.filter == "all"}, flush=True
        )


def table(folder: Path, overrides: list[str]) -> None:
    """Write the table, a row a file, from records."""
    rows = []
    for path in sorted(folder.glob("*.gguf")):
        spec = pin(spec_of(run_of(path, overrides))).spec
        record = RecordStore(Path(spec.paths.results)).find(spec)
        if record is None:
            print(f"{path}: has no record", file=sys.stderr)
            continue
        size = path.stat().st_size
        row: dict[str, object] = {"file": path.stem, "bytes": size, "tensors": describe_gguf(path).types}
        for each in record.scores:
            if each.filter == "all" and each.metric in ("kl", "top1_agreement"):
                row[f"{each.task} {each.metric}"] = round(each.value, 6)
                row[f"{each.task} {each.metric} stderr"] = None if each.stderr is None else round(each.stderr, 6)
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print({key: value for key, value in row.items() if "stderr" not in key})


if __name__ == "__main__":
    {"make": make, "score": score, "table": table}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
