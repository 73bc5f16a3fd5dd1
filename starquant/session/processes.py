"""The processes of one run: one, or as many as `accelerate launch` started, which share the items of every task.

    accelerate launch --multi_gpu --num_processes 4 run.py model=llada runtime.device=cuda
    python -m torch.distributed.run --nproc_per_node 2 run.py                     on CPUs

Every process holds the model; the first one alone calibrates, writes and prints. Draws come from each request's own
tokens, so that scores are those of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from starquant.errors import ConfigError, StarquantError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that calibrates, writes and prints."""
        return self.rank == 0

    def by_first(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return on every process what `work` returns on the first; an error of the user is raised on all.

        Raises:
            StarquantError: of `work`.
        """
        if self.world == 1:
            return work(*args, **kwargs)
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work(*args, **kwargs)
            except StarquantError as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def gather_numbers(self, number: Tensor) -> Tensor:
        """Return a scalar of every process, [world]."""
        from accelerate.utils import gather

        numbers: Tensor = number if self.world == 1 else gather(number.reshape(1))
        return numbers

    def gather_objects(self, obj: Any, rank: int = 0) -> list[Any] | None:
        """Return an object of every process, in order, to the process `rank`; None to the others."""
        if self.world == 1:
            return [obj]
        import torch.distributed as dist

        objects = [None] * self.world if self.rank == rank else None
        dist.gather_object(obj, objects, dst=rank)
        return objects

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()

    def device(self, device: str) -> str:
        """Return this process's device: with "cuda", the GPU of its local number."""
        local = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{local}" if device == "cuda" and self.world > 1 else device


ALONE = Processes()


#: What a launcher sets for each of its processes; with less, some of it is left over from another program.
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched_rank() -> int | None:
    """Return this process's number among several, None where a launcher did not start several.

    Raises:
        ConfigError: a launcher's variable that is no whole number.
    """
    settings = {name: os.environ.get(name) for name in LAUNCHED}
    if not all(settings.values()) or settings["WORLD_SIZE"] == "1":
        return None
    for name, value in settings.items():
        if name != "MASTER_ADDR" and not str(value).isdecimal():
            raise ConfigError(f"{name}: got {value!r} in the environment, allowed: a whole number")
    return int(settings["RANK"] or 0)


def processes() -> Processes:
    """Return the processes that this run was started with."""
    if launched_rank() is None:
        return ALONE
    import torch
    from accelerate import PartialState

    # One process may calibrate for hours while the others wait.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    return Processes(state.process_index, state.num_processes)
