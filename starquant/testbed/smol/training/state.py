"""What a training keeps on disk: its state while it runs, its log, and the delta at the end. Each file whole or not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from starquant.errors import CheckpointError

STATE = "training_state.safetensors"
LOG = "training_log.jsonl"
CARD = "training.json"
DELTA_FILES = ("delta-0.safetensors", "delta-1.safetensors")
_LOSS = "loss"  # name of the summed loss in a state; parameters are under p/, m/ and v/


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def save_state(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    run: Mapping[str, str],
    step: int,
    seconds: float,
) -> None:
    """Write the state after `step` steps.

    Args:
        path: of the file.
        network: whose parameters are trained.
        optimizer: of all of them, after a step.
        loss: summed over the steps since the last line of the log.
        run: what must be the same for another call to go on.
        step: steps made.
        seconds: that they took.
    """
    state: dict[str, Tensor] = {_LOSS: loss.detach().reshape(1)}
    for name, parameter in network.named_parameters():
        moments = optimizer.state[parameter]
        state |= {f"p/{name}": parameter.data, f"m/{name}": moments["exp_avg"], f"v/{name}": moments["exp_avg_sq"]}
    _write(path, state, {**run, "step": str(step), "seconds": f"{seconds:.3f}"})


def load_state(
    path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, run: Mapping[str, str]
) -> tuple[int, float]:
    """Restore what `save_state` wrote; returns steps made and seconds, (0, 0) where there is no state.

    Raises:
        CheckpointError: the state is of another training, or damaged.
    """
    if not path.exists():
        return 0, 0.0
    try:
        with safe_open(path, "pt") as file:
            saved = dict(file.metadata() or {})
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole training state ({error})") from None
    step, seconds = int(saved.pop("step", 0)), float(saved.pop("seconds", 0))
    if saved != run:
        names = sorted({*saved, *run})
        other = [f"{name} {saved.get(name)}, not {run.get(name)}" for name in names if saved.get(name) != run.get(name)]
        raise CheckpointError(f"{path}: is of another training ({'; '.join(other)}); use another --out")
    for name, parameter in network.named_parameters():
        parameter.data.copy_(state[f"p/{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),
            "exp_avg": state[f"m/{name}"].to(parameter.device),
            "exp_avg_sq": state[f"v/{name}"].to(parameter.device),
        }
    loss.copy_(state[_LOSS][0])
    return step, seconds


def write_delta(folder: Path, delta: Mapping[str, Tensor]) -> None:
    """Write a delta: its names in order, the first half in one file and the others in a second."""
    names = sorted(delta)
    half = len(names) // 2
    for file, part in zip(DELTA_FILES, (names[:half], names[half:]), strict=True):
        _write(folder / file, {name: delta[name] for name in part}, None)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> None:
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata=metadata)
    part.chmod(0o644)
    part.replace(path)


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write what describes a finished training."""
    part = folder / f"{CARD}.part"
    part.write_text(json.dumps(card, indent=1) + "\n")
    part.replace(folder / CARD)


class TrainingLog:
    """JSON Lines of a training, one a number of steps; those after the step that is gone on from are taken back."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [record for line in lines if (record := _record(line)) and record["step"] <= step]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _record(line: str) -> dict[str, Any] | None:
    """Return a line's record; None for one that was cut."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return None
