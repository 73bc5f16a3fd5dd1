"""Blocks that run faster: compiled, or replayed as CUDA graphs (the same kernels on the same memory, launched as one).

A pass of few tokens is over before Python has launched its kernels; replayed it costs what the GPU needs. One graph a
shape of the ids, and length of a block, is captured when it comes up, and the least recently used are given up.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from starquant.errors import ConfigError
from starquant.models.base import MaskedDiffusionModel

#: Runs what was captured again.
Replay = Callable[[], object]


def capture(work: Callable[[], object]) -> Replay:
    """Run work, then capture it as a CUDA graph; returns what replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled, libraries set up, before anything is captured
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with _uncollected(), torch.cuda.graph(graph):
        work()
    return graph.replay


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage: a kernel that is unloaded while a graph is captured makes the graph invalid."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class ReplayedBlocks:
    """What `MaskedDiffusionModel.forward` calls in place of its blocks where nothing is padded and nothing cached.

    Args:
        model: whose blocks are captured; its weights must stay where they are.
        most: graphs that are kept.
        captured: makes a replay of work (`capture`).
    """

    def __init__(
        self, model: MaskedDiffusionModel, most: int = 16, captured: Callable[[Callable[[], object]], Replay] = capture
    ) -> None:
        self.model, self.most, self.captured = model, most, captured
        self._kept: OrderedDict[tuple[int, ...], tuple[Tensor, Tensor, Replay]] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the hidden states [B, L, D] after the last block."""
        # Of block diffusion the mask is of the block's length, which a sampler may set (`blocks_of`).
        key = (*input_ids.shape, getattr(self.model, "block_length", 0))
        if key not in self._kept:
            while len(self._kept) >= self.most:
                self._kept.popitem(last=False)
            self._kept[key] = self._capture(input_ids)
        self._kept.move_to_end(key)
        ids, hidden, replay = self._kept[key]
        ids.copy_(input_ids)
        with _on(input_ids.device):
            replay()
        return hidden.clone()

    def _capture(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Replay]:
        ids = input_ids.clone()
        hidden = torch.empty_like(self.model.run_blocks(ids))

        def work() -> None:
            hidden.copy_(self.model.run_blocks(ids))

        with _on(input_ids.device):
            return ids, hidden, self.captured(work)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: streams and graphs are of it, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def replayed(model: MaskedDiffusionModel, wanted: bool = True) -> Iterator[None]:
    """Replay the model's unpadded passes while the context lasts; weights must not change meanwhile.

    Raises:
        ConfigError: a mixture of experts, whose passes are not alike.
    """
    if wanted and any(model.block_sites(block).experts for block in model.trunk().blocks):
        raise ConfigError("graphs: the tokens of an expert are others in every pass; allowed: without, for a mixture")
    model.replayed_blocks = ReplayedBlocks(model) if wanted else None
    try:
        yield
    finally:
        model.replayed_blocks = None


@contextmanager
def compiled_blocks(model: MaskedDiffusionModel, wanted: bool = True) -> Iterator[None]:
    """Run every block through torch.compile while the context lasts, for sequences of any length."""
    blocks = list(model.trunk().blocks) if wanted else []
    for block in blocks:
        block.compile(dynamic=True)
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"speed.compile: torch.compile does not work here: {reason}") from error
    finally:
        for block in blocks:  # what a method changes later must not meet code compiled for what was there
            block._compiled_call_impl = None
        if blocks:
            torch.compiler.reset()
