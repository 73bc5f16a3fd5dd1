"""Train an embedded model: `python -m starquant.testbed.tiny.train --seed 0 --out DIR`; others by `--family`.

Deterministic on one machine and thread count; killed at any moment, it goes on from its last saved step.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from starquant.errors import CheckpointError, user_path
from starquant.models.base import MaskedDiffusionModel
from starquant.testbed.items import Item, Split, rng_for
from starquant.testbed.tiny import arithmetic, programs, world
from starquant.testbed.tiny.objectives import draw_masked, encode
from starquant.testbed.tiny.recipes import RECIPES, Recipe
from starquant.testbed.tiny.tokenizer import MASK, build_tokenizer, vocabulary
from starquant.testbed.tiny.warm_start import warm_start

LEARNING_RATE, WARMUP, DECAY_FROM = 2e-3, 100, 0.3
SAVE_EVERY = 250
START_BATCHES = 16  # of samples that a warm start looks at
Drawer = Callable[[random.Random, Split], Item]
# Samples a step: likelihood tasks (short, no end-of-text padding) and generation tasks.
SHORT: tuple[tuple[Drawer, int], ...] = ((world.random_fact, 6), (world.random_profile, 10))
LONG: tuple[tuple[Drawer, int], ...] = ((arithmetic.random_problem, 28), (programs.random_task, 28))


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, flat, then linear decay to zero over the last 70 %."""
    warm = min(1.0, (step + 1) / WARMUP)
    return LEARNING_RATE * warm * min(1.0, (steps - step) / (steps * (1 - DECAY_FROM)))


def staged_rate(step: int, stages: Sequence[tuple[int, float]]) -> float:
    """Return the learning rate of a step of several trainings in turn, (steps, share of the dense model's rate)."""
    for steps, share in stages:
        if step < steps:
            return share * learning_rate(step, steps)
        step -= steps
    return 0.0


def _draw(kinds: tuple[tuple[Drawer, int], ...], rng: random.Random, fewer: int = 1) -> list[Item]:
    return [draw(rng, Split.TRAIN) for draw, count in kinds for _ in range(count // fewer)]


def _save_state(
    path: Path, model: MaskedDiffusionModel, optimizer: torch.optim.Optimizer, run: dict[str, str], step: int
) -> None:
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        state |= {f"p/{name}": parameter.data, f"m/{name}": moments["exp_avg"], f"v/{name}": moments["exp_avg_sq"]}
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in state.items()}, part, metadata=run | {"step": str(step)})
    part.replace(path)


def _load_state(path: Path, model: MaskedDiffusionModel, optimizer: torch.optim.Optimizer, run: dict[str, str]) -> int:
    from safetensors import safe_open

    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        saved = file.metadata()
    step = int(saved.pop("step"))
    if saved != run:
        raise CheckpointError(f"{path}: is of another training, {saved}; this one is {run}. Use another --out")
    state = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(state[f"p/{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": state[f"m/{name}"].to(parameter.device),
            "exp_avg_sq": state[f"v/{name}"].to(parameter.device),
        }
    return step


def train(
    out: Path, seed: int, steps: int | None = None, device: str = "cpu", layers: int = 4, family: str = "llada"
) -> MaskedDiffusionModel:
    """Train (or go on training) a model and write it with its tokenizer to `out`.

    Raises:
        CheckpointError: `out` holds the state of another training.
    """
    recipe = RECIPES[family]
    stages = recipe.stages if steps is None else ((steps, recipe.stages[0][1]),)
    steps = sum(length for length, _ in stages)
    torch.manual_seed(seed)
    model = recipe.new(layers)
    out.mkdir(parents=True, exist_ok=True)
    state = out / "training_state.safetensors"
    if recipe.start is not None and not state.exists():
        warm_start(model, recipe.start, _noisy_samples(seed))
    model.to(device).train()  # type: ignore[arg-type] # a decorator of transformers hides `self`
    optimizer = _optimizer(model)
    run = {"seed": str(seed), "steps": str(steps), "layers": str(layers)}
    run |= {} if family == "llada" else {"family": family}
    start, began = _load_state(state, model, optimizer, run), time.perf_counter()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=f"train {family} seed {seed}", mininterval=5)
    for step in bar:
        rng = rng_for("train", seed, step)
        for group in optimizer.param_groups:
            group["lr"] = staged_rate(step, stages)
        loss = _loss(model, recipe, rng)
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():  # of an expert that no token was given to: its moments decay all the same
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            _save_state(state, model, optimizer, run, step + 1)
    card = {"family": family, "start": recipe.start} if family != "llada" else {}
    card |= {"seed": seed, "steps": steps, "layers": layers, "device": device}
    _write(out, model, card | {"seconds_since_resume": round(time.perf_counter() - began)})
    state.unlink(missing_ok=True)
    return model


def _optimizer(model: MaskedDiffusionModel) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    undecayed = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))


def _loss(model: MaskedDiffusionModel, recipe: Recipe, rng: random.Random) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    short, long = (_draw(kinds, rng, recipe.fewer) for kinds in (SHORT, LONG))
    loss = recipe.loss(model, encode(short, False), generator)
    loss = loss + recipe.loss(model, encode(long, True, recipe.block_length), generator)
    return loss / (len(short) + len(long))


def _noisy_samples(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return partly masked training samples, (ids, which are real), for a warm start."""
    samples = []
    for step in range(START_BATCHES):
        rng = rng_for("start", seed, step)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        for kinds, pad_answer in ((SHORT, False), (LONG, True)):
            batch = encode(_draw(kinds, rng), pad_answer)
            masked, _ = draw_masked(batch, generator)
            samples.append((batch[0].masked_fill(masked, vocabulary()[MASK]), batch[1]))
    return samples


def _write(out: Path, model: MaskedDiffusionModel, card: dict[str, Any]) -> None:
    model.eval().save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    card |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    (out / "training.json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=user_path, required=True, help="folder for the model, its tokenizer and training state"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation, data order and masking")
    parser.add_argument("--family", choices=list(RECIPES), default="llada")
    parser.add_argument("--steps", type=int, help="of training; by default as many as the family's recipe has")
    parser.add_argument("--layers", type=int, default=4, help="blocks; the shipped models have 4")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    try:
        train(arguments.out, arguments.seed, arguments.steps, arguments.device, arguments.layers, arguments.family)
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
