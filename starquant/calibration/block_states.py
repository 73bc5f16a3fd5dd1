"""States of block diffusion: a noisy block behind clean ones, as generation and training have them.

Shape suffixes: L sequence, S states of a trajectory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from starquant.calibration.batches import Segment
from starquant.diffusion.trajectories import Trajectory


@dataclass(frozen=True)
class State:
    """One row [L] without padding; positions are None where they count up."""

    ids: Tensor
    ratio: float
    positions: Tensor | None = None


def behind_clean_text(state: State, segment: Segment, block_length: int) -> State:
    """Return the layout [noisy ; clean] of block diffusion: a masked segment, and behind it what its blocks read.

    Blocks of the prompt alone, which generation never denoises, are not in the noisy half.
    """
    first = segment.prompt_length // block_length * block_length
    places = torch.arange(len(segment.ids))
    ids = torch.cat((state.ids[first:], torch.tensor(segment.ids)))
    return State(ids, state.ratio, torch.cat((places[first:], places)))


def rows_of_blocks(trajectory: Trajectory, length: int, edits: bool) -> Iterator[list[State]]:
    """Yield each row's states up to the block that is denoised, their ratios its masked share.

    A row's states are those that it took a step from, and the final one: how long it waited depends on its batch.

    Args:
        trajectory: of block diffusion.
        length: tokens of a block.
        edits: a state whose next one has the same masks is of a finished block that is run once more.
    """
    for row, visible_L in enumerate(trajectory.visible_BL):
        ids_SL = trajectory.ids_SBL[:, row, visible_L].int()
        masked_SL = ids_SL == trajectory.mask_id
        same_S = [bool((now == after).all()) for now, after in itertools.pairwise(masked_SL)] + [False]
        stepped_S = [*trajectory.stepped_SB[:, row].tolist(), True]
        states = []
        for ids_L, masked_L, same, stepped in zip(ids_SL, masked_SL, same_S, stepped_S, strict=True):
            if not stepped:
                continue
            first = int(masked_L.int().argmax()) if bool(masked_L.any()) else len(ids_L) - 1
            begin = first // length * length
            if edits and same and first == begin > 0:
                begin -= length
            stop = min(begin + length, len(ids_L))
            states.append(State(ids_L[:stop], float(masked_L[begin:stop].double().mean())))
        yield states
