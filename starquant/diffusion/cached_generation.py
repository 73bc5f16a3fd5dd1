"""Approximate generation: KV caches over blocks, and every sure token at once (ideas of Fast-dLLM, arXiv 2505.22618).

A block's first pass computes all columns and keeps their keys and values. Later passes compute the block only (dual),
or the block and what follows it (prefix), and read the rest as it was, which is exact in the first layer only: hidden
states of all columns change with every token that is committed.

Shape suffixes: B rows, L = prompt + answer, N masked positions of the block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from starquant.diffusion.batch_size import BatchSize, draws_kept, in_batches
from starquant.diffusion.continuous_batching import Request, Settled, as_batch
from starquant.diffusion.generation import validate_room
from starquant.diffusion.predictor import MaskPredictor
from starquant.diffusion.samplers import BlockSampler, DenoisingState, Sampler
from starquant.diffusion.sampling import commit, top_ranked
from starquant.errors import ConfigError

if TYPE_CHECKING:
    from starquant.config.speed import SpeedSpec  # pydantic, which a bare machine lacks

#: Batches whose requests are filled block by block together. Our choice: what a kill may lose against full batches.
_SIDE_BY_SIDE = 4


@torch.inference_mode()
def generate_approximately(
    predict: MaskPredictor,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    speed: SpeedSpec,
    *,
    batch_size: BatchSize,
    seed: int = 0,
    settled: Settled | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (index of the request, answer tokens); rows do not depend on their batch.

    Args:
        predict: of the model.
        prompts: token ids of each request.
        sampler: temperature, guidance and lengths; its order of commits gives way to the blocks.
        speed: its kv_cache, confidence_threshold and block_length are what is approximated.
        batch_size: requests at a time.
        seed: of the random draws; each prompt's own tokens are mixed in.
        settled: as in `generate_many`; looked at after every block.

    Raises:
        ConfigError: a block length that does not divide the answer, a sampler that commits by chance, prompts that do
            not fit the model's context beside the answer.
    """
    sampler, length, steps = _validate_speed(sampler, speed)
    validate_room(predict.config, max(map(len, prompts), default=0), sampler.answer_length)
    waiting = [Request.new(i, tuple(prompts[i]), seed, sampler, predict.mask_id) for i in range(len(prompts))]
    waiting.sort(key=lambda request: -len(request.prompt))

    def tokens(request: Request) -> int:
        return sampler.branches * (len(request.prompt) + sampler.answer_length)

    while waiting:  # a few batches side by side, so that those that stay fill batches again
        together = _SIDE_BY_SIDE * batch_size.rows(tokens(waiting[0]))
        active, waiting = waiting[:together], waiting[together:]
        for begin in range(0, sampler.answer_length, length):
            block, left = slice(begin, begin + length), list[Request]()
            fill = functools.partial(_fill_block, predict, sampler=sampler, speed=speed, block=block, steps=steps)
            for batch, answers_BG in in_batches(active, tokens, batch_size, fill):
                for request, answer_G in zip(batch, answers_BG, strict=True):
                    request.answer_G, known = answer_G, answer_G[: block.stop].tolist()
                    if block.stop == sampler.answer_length or (settled is not None and settled(request.index, known)):
                        yield request.index, known
                    else:
                        left.append(request)
            active = left


def _validate_speed(sampler: Sampler, speed: SpeedSpec) -> tuple[Sampler, int, int]:
    """Return the sampler whose confidences are probabilities, the block length, and denoising steps a block."""
    whole = sampler.answer_length
    length = sampler.own_block_length if speed.block_length is None else speed.block_length
    if whole % length:
        raise ConfigError(f"speed.block_length: got {length}, must divide the answer's {whole} tokens")
    if isinstance(sampler, BlockSampler):
        raise ConfigError("speed: got shortcuts of generation; allowed: none with block diffusion, which has its own")
    if sampler.commits_by_chance:
        raise ConfigError("speed: kv_cache and confidence_threshold do not go with a sampler that commits by chance")
    if speed.confidence_threshold is not None:
        sampler = sampler.by_probability()
    return sampler, length, max(1, sampler.steps * length // whole)


def _fill_block(
    predict: MaskPredictor,
    requests: Sequence[Request],
    sampler: Sampler,
    speed: SpeedSpec,
    block: slice,
    steps: int,
) -> Tensor:
    """Return the answers [B, G] with one more block filled; when it fails, no draw has been taken."""
    state = as_batch(requests, predict)
    with draws_kept(state.generators):
        _denoise(predict, state, sampler, speed, block, steps)
    return state.ids_BL[:, state.prompt_length :].cpu()


def _denoise(
    predict: MaskPredictor, state: DenoisingState, sampler: Sampler, speed: SpeedSpec, block: slice, steps: int
) -> None:
    ids, width = state.ids_BL, block.stop - block.start
    first, end = state.prompt_length + block.start, state.prompt_length + block.stop
    cache: Any = None if speed.kv_cache == "none" else predict.model.new_cache()
    for step in range(width):
        rows, columns = (ids[:, first:end] == predict.mask_id).nonzero(as_tuple=True)
        if len(rows) == 0:
            return
        columns = columns + first
        token, confidence = sampler.candidates(predict, state, (rows, columns), cache)
        if speed.confidence_threshold is None:
            share = width // steps + (step < width % steps) if steps < width else 1
            chosen = top_ranked(confidence, rows, columns, ids.shape, _all_rows(ids, share))
        else:
            surest = top_ranked(confidence, rows, columns, ids.shape, _all_rows(ids, 1))
            chosen = surest | (confidence >= speed.confidence_threshold)
        commit(ids, (rows, columns), token, chosen)
        if cache is not None:  # the position that predicts the first column may lie in front of it
            cache.window = slice(first + predict.offset, end if speed.kv_cache == "dual" else ids.shape[1])


def _all_rows(ids_BL: Tensor, number: int) -> Tensor:
    return torch.full((len(ids_BL),), number, device=ids_BL.device)
