"""Training of a delta: rows, masks, steps of AdamW, and what is kept so that a stopped training goes on.

Shape suffixes: N predicted positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from starquant.errors import ConfigError
from starquant.testbed.items import Split, rng_for
from starquant.testbed.smol.training import state as training_state
from starquant.testbed.smol.training.documents import digest_of_documents, encode_documents, read_documents
from starquant.testbed.smol.training.network import Dimensions, Network
from starquant.testbed.smol.training.objective import Batch, cross_entropy, draw_masks, weighted_mean
from starquant.testbed.smol.training.options import DTYPES, Options, validate_options
from starquant.testbed.smol.training.packing import LENGTH, Source, Stream, batches, default_stream

WARMUP, FLOOR = 80, 0.03
HELD_OUT_ROWS, HELD_OUT_BATCHES = 256, 4  # at most
#: What must be the same for a state to be gone on from, beside the base, the text, the shares and the start.
_IDENTITY = ("seed", "tokens", "batch", "rank", "learning_rate", "layers", "dtype", "shard_rows", "log_every")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a small part of the peak."""
    warm = min(1.0, (step + 1) / min(WARMUP, max(1, steps // 10)))
    return peak * warm * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * step / steps)) / 2)


def new_optimizer(network: Network) -> torch.optim.AdamW:
    """Return AdamW; norms and the mask's embedding learn at a tenth of the rate, and do not decay."""
    factors = [parameter for parameter in network.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in network.parameters() if parameter.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": factors, "weight_decay": 0.01, "scale": 1.0},
        {"params": others, "weight_decay": 0.0, "scale": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def held_out_losses(network: Network, masked: Sequence[Batch]) -> dict[str, float | None]:
    """Return the mean cross-entropy of held-out natural text and of answers, None where there are none."""
    total = torch.zeros(2, 2, dtype=torch.float64)
    with torch.no_grad():
        for batch in masked:
            batch = batch.to(network.mask.device)
            loss_N = cross_entropy(network, batch).double()
            for row, where_N in enumerate((batch.natural_N, batch.answer_N)):
                total[row] += torch.stack((loss_N[where_N].sum(), where_N.sum().double())).cpu()
    return {
        name: loss / count if count else None
        for name, (loss, count) in zip(("natural", "task"), total.tolist(), strict=True)
    }


def held_out_batches(source: Source, batch: int) -> list[Batch]:
    """Return held-out rows with their masks, the same for every training of that batch size."""
    count = batch * max(1, min(HELD_OUT_BATCHES, HELD_OUT_ROWS // batch))
    rows, generator = source.rows(0, count), torch.Generator().manual_seed(0)
    return [draw_masks(rows.part(slice(row, row + batch)), generator) for row in range(0, count, batch)]


def new_network(
    options: Options, base: Mapping[str, Tensor], head_dim: int, start: Mapping[str, Tensor] | None
) -> Network:
    """Return the network that training starts from.

    Raises:
        ConfigError: more layers than the base has.
        CheckpointError: a start that does not fit.
    """
    whole = Dimensions.of(base, head_dim)
    layers = options.layers or whole.layers
    if layers > whole.layers:
        raise ConfigError(f"--layers: got {layers}, allowed: 1 to {whole.layers}")
    network = Network(base, replace(whole, layers=layers), options.rank, DTYPES[options.dtype], options.seed)
    if start is not None:
        network.start_from(start)
    return network


class Training:
    """One training: its network, rows, optimizer, log and state.

    Args:
        options: what it is called with.
        base: float32 weights of the pretrained model under transformers' Llama names, the head tied.
        tokenizer: of the base.
        stream: of the tasks' items; None for those of `testbed.smol.tasks.items`.
        start: delta to go on from; None for a fresh one.
        head_dim: width of the base's heads.

    Raises:
        ConfigError: an option that is not allowed.
        DataError: no text.
        CheckpointError: a state of another training, a start that does not fit.
    """

    def __init__(
        self,
        options: Options,
        base: Mapping[str, Tensor],
        tokenizer: Tokenizer,
        stream: Stream | None = None,
        start: Mapping[str, Tensor] | None = None,
        head_dim: int = 64,
    ) -> None:
        validate_options(options)
        self.options, self.steps, self.began = options, options.steps, time.perf_counter()
        documents = [] if options.text is None else read_documents(options.text)
        self.source, held_out = (
            self._source(tokenizer, stream or default_stream(), documents, split)
            for split in (Split.TRAIN, Split.VALIDATION)
        )
        self.held_out = held_out_batches(held_out, options.batch)
        self.network = new_network(options, base, head_dim, start)
        self.run = {name: str(getattr(options, name)) for name in _IDENTITY} | {
            "shares": str(dict(options.shares)),
            "text": digest_of_documents(documents),
            "start": training_state.digest_of(self.network.delta()),
            "base": training_state.digest_of(base),
        }
        self.network.to(options.device)
        self.optimizer = new_optimizer(self.network)
        self.loss = torch.zeros((), device=options.device)  # summed since the last line of the log
        self._load()
        if self.network.mask.device.type == "cuda":
            for block in self.network.blocks:
                block.compile()

    def _source(self, tokenizer: Tokenizer, stream: Stream, documents: list[str], split: Split) -> Source:
        seed = self.options.seed if split is Split.TRAIN else 0
        text = encode_documents(tokenizer, documents, split) if documents else None
        return Source(tokenizer, stream, self.options.shares, split, seed, text)

    def _load(self) -> None:
        out = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        self.state = out / training_state.STATE
        self.step, self.seconds = training_state.load_state(
            self.state, self.network, self.optimizer, self.loss, self.run
        )
        self.log = training_state.TrainingLog(out / training_state.LOG, self.step)

    def go_on(self) -> bool:
        """Train until the end or the time is up, and write the delta; returns whether it is the end."""
        rest = range(self.step, self.steps)
        rows = batches(self.source, self.options.batch, rest, self.options.workers, self.options.shard_rows)
        bar = tqdm(rows, f"train smol seed {self.options.seed}", self.steps, initial=self.step, mininterval=5)
        with closing(rows), bar:
            for batch in bar:
                masks = rng_for("smol masks", self.options.seed, self.step)
                self.make_step(draw_masks(batch, torch.Generator().manual_seed(masks.getrandbits(62))))
                if self.step % self.options.log_every == 0 or self.step == self.steps:
                    bar.set_postfix(loss=f"{self.write_line():.3f}", refresh=False)
                minutes = (time.perf_counter() - self.began) / 60
                stopped = self.step < self.steps and minutes >= (self.options.minutes or math.inf)
                if stopped or self.step % self.options.save_every == 0 or self.step == self.steps:
                    self.save()
                if stopped:  # as far as it has come: worth having of a training that went on with a delta
                    training_state.write_delta(self.options.out, self.network.delta())
                    return False
        self.finish()
        return True

    def make_step(self, batch: Batch) -> None:
        """Learn from one batch."""
        batch = batch.to(self.network.mask.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.options.learning_rate) * group["scale"]
        loss = weighted_mean(cross_entropy(self.network, batch), batch.weight_N)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.loss += loss.detach()
        self.step += 1

    def write_line(self) -> float:
        """Log the loss since the last line, at some steps the held-out losses too; returns the loss."""
        every = self.options.log_every
        loss = self.loss.item() / (self.step % every or every)
        self.validate_loss()
        self.loss.zero_()
        record: dict[str, Any] = {"step": self.step, "loss": loss}
        if self.step % self.options.validate_every == 0 or self.step == self.steps:
            record |= held_out_losses(self.network, self.held_out)
        rate = learning_rate(self.step - 1, self.steps, self.options.learning_rate)
        tokens = self.step * self.options.batch * LENGTH
        self.log.add({**record, "learning_rate": rate, "tokens": tokens, "seconds": round(self.elapsed(), 1)})
        return loss

    def validate_loss(self) -> None:
        """Refuse to go on, or to keep, what has diverged; raises ConfigError."""
        if not math.isfinite(self.loss.item()):
            raise ConfigError(
                f"--learning-rate {self.options.learning_rate:g}: the loss is not finite after {self.step} steps; "
                "use a smaller one and another --out"
            )

    def save(self) -> None:
        """Write the state."""
        self.validate_loss()
        training_state.save_state(
            self.state, self.network, self.optimizer, self.loss, self.run, self.step, self.elapsed()
        )

    def elapsed(self) -> float:
        """Return the seconds of training, over all calls."""
        return self.seconds + time.perf_counter() - self.began

    def finish(self) -> None:
        """Write the delta and what describes it, and remove the state."""
        out, device = self.options.out, self.network.mask.device
        named = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in named.items()}
        training_state.write_delta(out, self.network.delta())
        card = {
            "arguments": arguments,
            "steps": self.steps,
            "tokens": self.steps * self.options.batch * LENGTH,
            "held_out": held_out_losses(self.network, self.held_out),
            "base": self.run["base"],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "seconds": round(self.elapsed()),
        }
        training_state.write_card(out, card)
        self.state.unlink(missing_ok=True)
