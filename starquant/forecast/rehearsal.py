"""One block of the true shape and noise for weights, calibrated, changed and run on this machine."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from starquant.calibration.batches import CalibrationStates, StateBatch
from starquant.config.bits import BitsSpec
from starquant.config.methods import METHODS
from starquant.config.methods.base import MethodOptions
from starquant.forecast.counting import Passes, Shape
from starquant.methods.fitted import Fitted
from starquant.models.base import MaskedDiffusionModel
from starquant.quantized.probe import measure_operands

#: Multiply-adds that a pass may cost where it is timed; longer ones are in proportion.
PASS_BUDGET = 3e10
#: Multiply-adds of the block over the tokens that a fit is rehearsed with.
FIT_BUDGET = 5e11
#: Tokens that a fit is rehearsed with at the least: fewer leave its second moments empty.
FEWEST_TOKENS = 1024
#: Optimisation steps of a rehearsed fit: the small and the large share of all.
STEPS = (1 / 16, 1 / 4)
#: Parameters of a block above which a step is seconds: one and two are enough to tell.
LARGE_BLOCK = 3e7
NOISE = 2**20
#: Times that a pass is timed, and the seconds of one that is not timed again.
REPEATS, ENOUGH_S = 3, 1.0


def block_of_noise(
    skeleton: MaskedDiffusionModel, device: str, dtype: torch.dtype, words: int | None = None
) -> MaskedDiffusionModel:
    """Return a model of the skeleton's shape with one block, its weights noise of a sane size.

    Args:
        skeleton: on the meta device.
        device: where the run computes.
        dtype: of the run's weights.
        words: of its vocabulary, the last one [MASK]; None for the skeleton's.
    """
    config = copy.deepcopy(skeleton.config)
    config.num_hidden_layers = 1
    if getattr(config, "first_k_dense_replace", 0):
        config.first_k_dense_replace = 0  # of a mixture with some dense layers: most blocks are not
    if words is not None:
        config.vocab_size, config.mask_token_id = words, words - 1
        if getattr(config, "embedding_size", None) is not None:
            config.embedding_size = words
    with torch.device("meta"):
        model: MaskedDiffusionModel = type(skeleton)(config)
    nn.Module.to(model, dtype)
    model.to_empty(device=device)
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for name, tensor in model.named_parameters():
        if tensor.dim() == 1:
            tensor.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        flat = tensor.data.view(-1)
        for begin in range(0, flat.numel(), NOISE):
            flat[begin : begin + NOISE] = noise[: flat.numel() - begin]
        tensor.data /= math.sqrt(tensor.shape[1])
    model.requires_grad_(False).eval()
    return model


def block_size(model: MaskedDiffusionModel) -> int:
    """Return how many weights the linears of its (first) block have."""
    block = model.trunk().blocks[0]
    return sum(linear.weight.numel() for linear in block.modules() if isinstance(linear, nn.Linear))


@dataclass(frozen=True)
class Speed:
    """How long a model's passes take.

    Attributes:
        tokens: of the passes that were timed, ascending.
        seconds: of one block for each of them.
        logit_row: seconds of the logits of a position.
    """

    tokens: Sequence[int]
    seconds: Sequence[float]
    logit_row: float

    @classmethod
    def of(cls, model: MaskedDiffusionModel, shapes: Iterable[Shape]) -> Speed:
        """Time one block, and the head, for what goes through them."""
        weights = block_size(model)
        most = max(16, int(PASS_BUDGET / weights))
        wanted = sorted({rows * columns: (rows, columns) for rows, columns in shapes}.items()) or [(64, (1, 64))]
        chosen = {wanted[0][1], wanted[len(wanted) // 2][1], wanted[-1][1]}
        points: dict[int, float] = {}
        for rows, columns in chosen:
            fewer = max(1, min(rows, most // columns))
            ids = torch.randint(0, 64, (fewer, columns if fewer > 1 else min(columns, max(16, most))))
            ids = ids.to(model.device)
            seconds = fastest(lambda ids=ids: model.run_blocks(ids), model.device)
            points[rows * columns] = seconds * rows * columns / ids.numel()
        hidden = torch.zeros(32, model.trunk().embedding.embedding_dim, device=model.device, dtype=model.dtype)
        logit_row = fastest(lambda: model.project(hidden), model.device) / len(hidden)
        return cls(sorted(points), [points[tokens] for tokens in sorted(points)], logit_row)

    def of_passes(self, passes: Passes, blocks: int) -> float:
        """Return the seconds of passes through so many blocks and the head."""
        each = sum(times * self._block(rows * columns) for (rows, columns), times in passes.shapes.items())
        return blocks * each + passes.logit_rows * self.logit_row

    def _block(self, tokens: int) -> float:
        """Return a block's seconds: in between the timed passes by a straight line, beyond them in proportion."""
        if tokens >= self.tokens[-1]:
            return self.seconds[-1] * tokens / self.tokens[-1]
        if tokens <= self.tokens[0]:
            return self.seconds[0]
        above = next(i for i, timed in enumerate(self.tokens) if timed > tokens)
        low, high = self.tokens[above - 1], self.tokens[above]
        part = (tokens - low) / (high - low)
        return self.seconds[above - 1] * (1 - part) + self.seconds[above] * part


@torch.inference_mode()
def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of a few times; of one where that takes longer than `ENOUGH_S`."""
    least = math.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - began)
        if least > ENOUGH_S:
            break
    return least


@dataclass(frozen=True)
class FitCost:
    """What calibrating a block takes.

    Attributes:
        seconds: by all tokens and steps.
        walks: how often a token goes through the block.
        bytes: of what is learned.
    """

    seconds: float = 0.0
    walks: float = 0.0
    bytes: int = 0


@dataclass
class Rehearsal:
    """A method on one block.

    Args:
        model: of one block and few words; stays as it is until the method is applied.
        options: of the method.
        bits: of the run.
        states: of the calibration, or the first of them; None where the method needs none.
        tokens: of the whole calibration.
    """

    model: MaskedDiffusionModel
    options: MethodOptions
    bits: BitsSpec
    states: CalibrationStates | None
    tokens: float = 0.0
    fitted: Fitted = field(init=False, default_factory=Fitted)

    def fit(self) -> FitCost:
        """Calibrate the block on few tokens, with few steps where the method optimises; what it learned is kept."""
        if self.states is None:
            self.fitted = METHODS.build(self.options).fit(self.model, self.bits, None, Fitted())
            return FitCost()
        states, steps, weights = of_few_words(self.states, self.model), steps_of(self.options), block_size(self.model)
        most = min(max(FEWEST_TOKENS, int(FIT_BUDGET / weights)), tokens_of(states))
        many = first_tokens(states, most)
        some, more = (1, 2) if weights > LARGE_BLOCK else (math.ceil(steps * STEPS[0]), math.ceil(steps * STEPS[1]))
        seconds, walked = self._fit(many, some)
        cost = seconds
        if steps > more > some:
            cost += (self._fit(many, more)[0] - seconds) / (more - some) * (steps - some)
        if tokens_of(many) < self.tokens:
            few = first_tokens(states, most // 2)
            each = (seconds - self._fit(few, some)[0]) / (tokens_of(many) - tokens_of(few))
            cost += max(0.0, each) * (self.tokens - tokens_of(many))
        learned = [self.fitted.get(part) for part in self.fitted.parts()]
        size = sum(tensor.nbytes for tensors in learned for tensor in tensors.values())
        return FitCost(max(cost, seconds), walked / tokens_of(many), size)

    def _fit(self, states: CalibrationStates, steps: int) -> tuple[float, float]:
        """Return the seconds of a fit, and the tokens that went through the block."""
        kind, walked = type(self.model.trunk().blocks[0]), 0

        def see(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            nonlocal walked
            if isinstance(module, kind):
                walked += arguments[0].shape[0] * arguments[0].shape[1]

        method = METHODS.build(with_steps(self.options, steps))
        handle, began = nn.modules.module.register_module_forward_pre_hook(see), time.perf_counter()
        try:
            self.fitted = method.fit(self.model, self.bits, states, Fitted())
        finally:
            handle.remove()
        return time.perf_counter() - began, walked

    def apply(self, model: MaskedDiffusionModel, seed: int) -> float:
        """Quantize a model of one block in place, as a run does; returns the seconds."""
        began = time.perf_counter()
        manifest = METHODS.build(self.options).apply(model, self.fitted, self.bits)
        measure_operands(model, manifest, seed)
        return time.perf_counter() - began


def tokens_of(states: CalibrationStates) -> int:
    """Return the tokens of all states, padding included."""
    return sum(batch.ids_BL.numel() for batch in states.batches)


def first_tokens(states: CalibrationStates, most: int) -> CalibrationStates:
    """Return the first states: as many as have so many tokens, one at the least."""
    batches: list[StateBatch] = []
    left = most
    for batch in states.batches:
        rows = max(0 if batches else 1, min(len(batch.ids_BL), left // batch.ids_BL.shape[1]))
        if not rows:
            break
        batches.append(batch.of_rows(slice(rows)))
        left -= rows * batch.ids_BL.shape[1]
    return replace(states, batches=batches)


def of_few_words(states: CalibrationStates, model: MaskedDiffusionModel) -> CalibrationStates:
    """Return the states with ids that a model of few words has, masked where they are masked."""
    mask_id = model.mask_token_id
    batches = [
        replace(batch, ids_BL=(batch.ids_BL % mask_id).masked_fill(batch.ids_BL == states.mask_id, mask_id))
        for batch in states.batches
    ]
    return replace(states, batches=batches, mask_id=mask_id)


def steps_of(options: MethodOptions) -> int:
    """Return the optimisation steps of a method, 1 where it has none."""
    return int(getattr(getattr(options, "transform", None), "steps", None) or 1)


def with_steps(options: MethodOptions, steps: int) -> MethodOptions:
    """Return the options with so many optimisation steps, unchanged where the method has none."""
    transform = getattr(options, "transform", None)
    if transform is None or getattr(transform, "steps", None) is None:
        return options
    return options.model_copy(update={"transform": transform.model_copy(update={"steps": steps})})
