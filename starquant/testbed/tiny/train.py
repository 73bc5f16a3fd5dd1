"""Train the embedded model: `python -m starquant.testbed.tiny.train --seed 0 --out DIR`.

Deterministic on one machine and thread count; killed at any moment, it goes on from its last saved step.
The loss draws l uniformly from 1..n, masks l of the n maskable tokens and averages their cross-entropy: the
expectation of the 1/t-weighted masked-diffusion loss (LLaDA, eq. 3) at far lower variance.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from starquant.errors import CheckpointError, user_path
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.testbed.items import ANSWER_LENGTH, Item, Split, rng_for
from starquant.testbed.tiny import arithmetic, programs, world
from starquant.testbed.tiny.tokenizer import EOS, MASK, build_tokenizer, vocabulary

STEPS, LEARNING_RATE, WARMUP, DECAY_FROM = 16_000, 2e-3, 100, 0.3
SAVE_EVERY = 500
ANSWER_ONLY = 0.9  # share of samples masked in the answer only; the others anywhere
Drawer = Callable[[random.Random, Split], Item]
# Samples a step: likelihood tasks (short, no end-of-text padding) and generation tasks.
SHORT: tuple[tuple[Drawer, int], ...] = ((world.random_fact, 6), (world.random_profile, 10))
LONG: tuple[tuple[Drawer, int], ...] = ((arithmetic.random_problem, 28), (programs.random_task, 28))


def tiny_config(layers: int = 4) -> LLaDAConfig:
    """The embedded model's configuration: LLaDA's architecture at 0.7 M parameters (4 layers)."""
    words = vocabulary()
    return LLaDAConfig(
        d_model=128,
        n_heads=2,
        n_kv_heads=2,
        n_layers=layers,
        mlp_hidden_size=256,
        vocab_size=len(words),
        embedding_size=-(-len(words) // 64) * 64,
        max_sequence_length=256,
        mask_token_id=words[MASK],
        eos_token_id=words[EOS],
        pad_token_id=words[EOS],
        init_std=0.02,
    )


def encode(items: list[Item], pad_answer: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [B, L], real-token mask [B, L] and answer mask [B, L], padded on the right."""
    words = vocabulary()
    rows, starts = [], []
    for item in items:
        prompt, answer = item.prompt.split(), item.answer.split()
        answer += [EOS] * (ANSWER_LENGTH - len(answer)) if pad_answer else []
        rows.append([words[w] for w in prompt + answer])
        starts.append(len(prompt))
    lengths = torch.tensor([len(row) for row in rows])
    column = torch.arange(int(lengths.max()))
    ids = torch.tensor([row + [words[EOS]] * (len(column) - len(row)) for row in rows])
    real = column < lengths[:, None]
    return ids, real, real & (column >= torch.tensor(starts)[:, None])


def masked_loss(model: LLaDAModelLM, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """Sum over samples of the mean cross-entropy at l ~ U{1..n} masked tokens."""
    ids, real, answer = batch
    anywhere = torch.rand(len(ids), 1, generator=generator) >= ANSWER_ONLY
    maskable = torch.where(anywhere, real, answer)
    n = maskable.sum(1)
    level = (torch.rand(len(ids), generator=generator) * n).long() + 1
    order = torch.rand(ids.shape, generator=generator).masked_fill(~maskable, 2.0).argsort(1).argsort(1)
    masked = order < level[:, None]
    device = model.device
    noisy = torch.where(masked, model.mask_token_id, ids).to(device)
    rows, columns = masked.nonzero(as_tuple=True)
    positions = (rows.to(device), columns.to(device))
    logits = model(noisy, attention_mask=real.to(device), logit_positions=positions).logits
    loss = F.cross_entropy(logits.float(), ids[masked].to(device), reduction="none")
    return (loss / level[rows].to(device)).sum()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, flat, then linear decay to zero over the last 70 %."""
    warm = min(1.0, (step + 1) / WARMUP)
    return LEARNING_RATE * warm * min(1.0, (steps - step) / (steps * (1 - DECAY_FROM)))


def _draw(kinds: tuple[tuple[Drawer, int], ...], rng: random.Random) -> list[Item]:
    return [draw(rng, Split.TRAIN) for draw, count in kinds for _ in range(count)]


def _save_state(
    path: Path, model: LLaDAModelLM, optimizer: torch.optim.Optimizer, run: dict[str, str], step: int
) -> None:
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        state |= {f"p/{name}": parameter.data, f"m/{name}": moments["exp_avg"], f"v/{name}": moments["exp_avg_sq"]}
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in state.items()}, part, metadata=run | {"step": str(step)})
    part.replace(path)


def _load_state(path: Path, model: LLaDAModelLM, optimizer: torch.optim.Optimizer, run: dict[str, str]) -> int:
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


def train(out: Path, seed: int, steps: int = STEPS, device: str = "cpu", layers: int = 4) -> LLaDAModelLM:
    """Train (or go on training) a model and write it with its tokenizer to `out`."""
    torch.manual_seed(seed)
    model = LLaDAModelLM(tiny_config(layers))
    model.to(device).train()  # type: ignore[arg-type] # a decorator of transformers hides `self`
    decayed = [p for p in model.parameters() if p.dim() > 1]
    undecayed = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    out.mkdir(parents=True, exist_ok=True)
    state = out / "training_state.safetensors"
    run = {"seed": str(seed), "steps": str(steps), "layers": str(layers)}
    start, began = _load_state(state, model, optimizer, run), time.perf_counter()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=f"train tiny seed {seed}", mininterval=5)
    for step in bar:
        rng = rng_for("train", seed, step)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        short, long = _draw(SHORT, rng), _draw(LONG, rng)
        loss = masked_loss(model, encode(short, False), generator) + masked_loss(model, encode(long, True), generator)
        loss = loss / (len(short) + len(long))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            _save_state(state, model, optimizer, run, step + 1)
    model.eval().save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    card = {
        "seed": seed,
        "steps": steps,
        "layers": layers,
        "device": device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    card["seconds_since_resume"] = round(time.perf_counter() - began)
    (out / "training.json").write_text(json.dumps(card, indent=1) + "\n")
    state.unlink(missing_ok=True)
    return model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=user_path, required=True, help="folder for the model, its tokenizer and training state"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation, data order and masking")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--layers", type=int, default=4, help="blocks; the shipped models have 4")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    try:
        train(arguments.out, arguments.seed, arguments.steps, arguments.device, arguments.layers)
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
