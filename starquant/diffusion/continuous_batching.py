"""Generation of many requests in a batch that is refilled: a request leaves once its answer cannot change any more.

Committed tokens never change, so that an answer is settled as soon as everything up to its end (a stop string, EOS) is
committed. Steps that commit nothing are not computed where no random draw depends on them. Tokens are those of
`generate`, request by request: a row's draws come from its own generator.

Shape suffixes: B active requests, P longest active prompt, G answer tokens, L = P + G.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starquant.diffusion.batch_size import BatchSize, draws_kept, in_batches, out_of_memory
from starquant.diffusion.generation import left_padded, validate_room
from starquant.diffusion.masking import seeded_generator
from starquant.diffusion.predictor import MaskPredictor
from starquant.diffusion.samplers import BlockSampler, DenoisingState, Sampler
from starquant.diffusion.special_tokens import padding_id

#: Called with a request's index and the committed tokens in front of its first masked one.
Settled = Callable[[int, list[int]], bool]


@dataclass
class Request:
    """One request under way: its draws, what is committed, its next step."""

    index: int
    prompt: tuple[int, ...]
    generator: torch.Generator
    answer_G: Tensor
    step: int = 0
    known: int = 0  # committed tokens in front of the first masked one, when last looked at

    @classmethod
    def new(cls, index: int, prompt: tuple[int, ...], seed: int, sampler: Sampler, mask_id: int) -> Request:
        """Return a request none of whose answer is known."""
        answer_G = torch.full((sampler.answer_length,), mask_id)
        return cls(index, prompt, seeded_generator(seed, "generation", prompt), answer_G)


@torch.inference_mode()
def generate_many(
    predict: MaskPredictor,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    batch_size: BatchSize,
    seed: int = 0,
    settled: Settled | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (index of the request, answer tokens) as requests are finished.

    An answer that was settled early ends in front of its first token that was still masked.

    Args:
        predict: of the model.
        prompts: token ids of each request.
        sampler: how to denoise.
        batch_size: requests at a time.
        seed: of the random draws; each prompt's own tokens are mixed in, as in `generate`.
        settled: whether the tokens known so far settle the answer; None waits for all of them.

    Raises:
        ConfigError: prompts that do not fit the model's context beside the answer.
    """
    if not prompts:
        return
    validate_room(predict.config, max(map(len, prompts)), sampler.answer_length)
    if isinstance(sampler, BlockSampler):
        yield from _generate_blocks(predict, prompts, sampler, batch_size, seed, settled)
        return
    waiting = [Request.new(i, tuple(prompts[i]), seed, sampler, predict.mask_id) for i in range(len(prompts))]
    waiting.sort(key=lambda request: len(request.prompt))  # taken from the end: the longest first
    active: list[Request] = []
    state: DenoisingState | None = None
    while waiting or active:
        longest = sampler.branches * (len((active or waiting[-1:])[0].prompt) + sampler.answer_length)
        while waiting and len(active) < batch_size.rows(longest):
            active.append(waiting.pop())
            state = None
        if state is None:
            state = as_batch(active, predict)
        if not _advance(predict, sampler, state, active):
            batch_size.halve(len(active), longest)
            waiting += reversed(active[batch_size.rows(longest) :])
            active, state = active[: batch_size.rows(longest)], None
            continue
        answers_BG, left = state.ids_BL[:, state.prompt_length :].cpu(), []
        for request, answer_G in zip(active, answers_BG, strict=True):
            request.answer_G = answer_G
            answer = _finished(request, predict.mask_id, sampler, settled)
            if answer is None:
                left.append(request)
            else:
                yield request.index, answer
        if len(left) < len(active):
            active, state = left, None


def _generate_blocks(
    predict: MaskPredictor,
    prompts: Sequence[Sequence[int]],
    sampler: BlockSampler,
    batch_size: BatchSize,
    seed: int,
    settled: Settled | None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield answers of block diffusion, as `generate_many`; prompts of one length side by side: their blocks align."""
    requests = [Request.new(i, tuple(prompts[i]), seed, sampler, predict.mask_id) for i in range(len(prompts))]

    def length(request: Request) -> int:
        return len(request.prompt) + sampler.gen_length

    def fill(batch: Sequence[Request]) -> list[list[int]]:
        state, ended = as_batch(batch, predict), set[int]()
        with draws_kept(state.generators):
            for canvas in sampler.blockwise(predict, state):
                for row, request in enumerate(batch) if settled is not None else ():
                    if row not in ended and settled(request.index, _known(state, row, predict.mask_id)):
                        ended.add(row)
                        canvas.finished_B[row] = True
        return [_known(state, row, predict.mask_id) for row in range(len(batch))]

    for _, alike in itertools.groupby(sorted(requests, key=lambda r: -length(r)), key=length):
        for batch, answers in in_batches([*alike], length, batch_size, fill):
            yield from ((request.index, answer) for request, answer in zip(batch, answers, strict=True))


def _known(state: DenoisingState, row: int, mask_id: int) -> list[int]:
    """Return a row's answer in front of its first mask."""
    answer = state.ids_BL[row, state.prompt_length :].tolist()
    return answer[: answer.index(mask_id)] if mask_id in answer else answer


def as_batch(active: Sequence[Request], predict: MaskPredictor) -> DenoisingState:
    """Return the active requests as one batch, padded on the left."""
    prompt_BP, visible_BP = left_padded([request.prompt for request in active], padding_id(predict.config))
    answer_BG = torch.stack([request.answer_G for request in active])
    ids_BL = torch.cat((prompt_BP, answer_BG), 1).to(predict.device)
    prompt_BL = torch.cat((prompt_BP != predict.mask_id, torch.zeros_like(answer_BG, dtype=torch.bool)), 1).to(
        predict.device
    )
    visible_BL = None
    if not bool(visible_BP.all()):
        visible_BL = torch.cat((visible_BP, torch.ones_like(answer_BG, dtype=torch.bool)), 1).to(predict.device)
    generators = [request.generator for request in active]
    return DenoisingState(ids_BL, prompt_BP.shape[1], visible_BL, generators, prompt_BL=prompt_BL)


def _advance(predict: MaskPredictor, sampler: Sampler, state: DenoisingState, active: Sequence[Request]) -> bool:
    """Take each request's next step that commits (or draws) something; False, with nothing changed, out of memory."""
    masked_B = (state.ids_BL == predict.mask_id).sum(1).cpu()
    for row, request in enumerate(active):
        while sampler.idle(request.step, int(masked_B[row])):
            request.step += 1
    step_B = torch.tensor([request.step for request in active])
    commit_B = sampler.commits(step_B, masked_B)
    try:
        with draws_kept(state.generators):
            sampler.advance(predict, state, step_B.to(predict.device), commit_B.to(predict.device))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    for request in active:
        request.step += 1
    return True


def _finished(request: Request, mask_id: int, sampler: Sampler, settled: Settled | None) -> list[int] | None:
    """Return the answer of a request that is finished, None of one that is not."""
    answer = request.answer_G.tolist()
    known = answer.index(mask_id) if mask_id in answer else len(answer)
    if known == len(answer) or request.step >= sampler.steps:
        return answer
    if settled is None or known == request.known:
        return None
    request.known = known
    return answer[:known] if settled(request.index, answer[:known]) else None
