"""How many sequences go through the model at once: a given number, or what free memory holds; half after a failure.

The size changes the speed; scores and tokens by rounding only.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import torch
from torch import nn

from starquant.errors import ConfigError, DeviceError

T = TypeVar("T")
R = TypeVar("R")

#: More tokens at once make no device faster: a CPU's caches are full, a GPU's multiprocessors busy. Our choice.
MOST_TOKENS = {"cpu": 2**12, "cuda": 2**16}
MOST_ROWS = 512
#: Part of the free memory that activations may take; the rest is for logits and the allocator. Our choice.
SHARE = 0.5


class BatchSize:
    """How many sequences of a length go through the model at once.

    Args:
        rows: at most.
        tokens: at most, rows times length; None for no limit.
    """

    def __init__(self, rows: int = MOST_ROWS, tokens: int | None = None) -> None:
        self._rows, self._tokens = rows, tokens

    @classmethod
    def of(cls, size: int | str, model: nn.Module) -> BatchSize:
        """Return a given number of rows, or with "auto" as many tokens as free memory holds, a power of two.

        Raises:
            ConfigError: neither.
        """
        if size != "auto":
            if not str(size).isdecimal() or int(size) < 1:
                raise ConfigError(f"batch_size: got {size!r}, allowed: auto, or a whole number from 1")
            return cls(int(size))
        device = next(model.parameters()).device
        fitting = int(SHARE * free_bytes(device) // bytes_per_token(model.config))
        tokens = min(MOST_TOKENS.get(device.type, 2**12), max(1, fitting))
        return cls(tokens=2 ** (tokens.bit_length() - 1))

    def rows(self, length: int) -> int:
        """Return how many sequences of `length` tokens go through together, one at least."""
        return self._rows if self._tokens is None else max(1, min(self._rows, self._tokens // max(1, length)))

    def halve(self, rows: int, length: int) -> None:
        """Take half after `rows` sequences did not fit.

        Raises:
            DeviceError: one sequence does not fit.
        """
        if rows <= 1:
            raise DeviceError(f"out of memory at one sequence of {length} tokens: take a larger device")
        if self._tokens is None:
            self._rows = min(self._rows, -(-rows // 2))
        else:
            self._tokens = max(1, rows * length // 2)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def bytes_per_token(config: Any) -> int:
    """Return what one token's activations take while a block runs, generously: float32 copies of its widest tensors."""
    feed_forward = getattr(config, "feed_forward_size", None) or config.intermediate_size
    return int(4 * (8 * config.hidden_size + 4 * feed_forward))


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available)


#: How PyTorch's libraries say that memory is full.
_FULL = (
    *(
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "std::bad_alloc",
        "could not create a memory object",
    ),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


def out_of_memory(error: Exception) -> bool:
    """Return whether an exception says that memory is full, of a GPU or the host."""
    full = isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)
    return full or isinstance(error, torch.OutOfMemoryError | MemoryError)


@contextmanager
def draws_kept(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Take back what was drawn when the pass inside fails, so that it can be done again."""
    states = [generator.get_state() for generator in generators]
    try:
        yield
    except (RuntimeError, MemoryError):
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        raise


def in_batches(
    items: Sequence[T], length: Callable[[T], int], size: BatchSize, work: Callable[[Sequence[T]], R]
) -> Iterator[tuple[Sequence[T], R]]:
    """Yield (batch, what `work` makes of it); a batch that does not fit into memory is halved and done again.

    Args:
        items: the longest first.
        length: tokens of an item.
        size: of batches.
        work: changes nothing when it fails.

    Raises:
        DeviceError: one item does not fit.
    """
    begin = 0
    while begin < len(items):
        longest = length(items[begin])
        batch = items[begin : begin + size.rows(longest)]
        try:
            done = work(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        else:
            yield batch, done
            begin += len(batch)
            continue
        size.halve(len(batch), longest)  # outside `except`: the exception's frames hold tensors
