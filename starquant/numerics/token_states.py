"""Token states, the order of every axis of states, and SGAT's gate on channels.

A token is [MASK] or it is not. Block diffusion tells more apart: the block that is being denoised reads finished ones,
whose tokens nothing changes any more. Whatever has one entry a state (clip ratios, statistics, maps) has them in the
order of the states that a model declares: axis S, index 0 masked.

Shape suffixes: B batch, L sequence length, S token states, D width.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


class TokenState(str, Enum):
    """What a token is in the forward pass at hand.

    "masked" is [MASK], "unmasked" any other token of a model that tells no more apart. In block diffusion "committed"
    is a token of the block that is denoised, beside masks; "edited" one of a block without masks that is run once more,
    only to be reconsidered (LLaDA2.1); "context" one of a finished block.
    """

    MASKED = "masked"
    UNMASKED = "unmasked"
    COMMITTED = "committed"
    EDITED = "edited"
    CONTEXT = "context"


#: States that a kind of model has, in the order of its axes of states. The first is masked, context the last.
States = tuple[TokenState, ...]
BIDIRECTIONAL: States = (TokenState.MASKED, TokenState.UNMASKED)
BLOCK_DIFFUSION: States = (TokenState.MASKED, TokenState.COMMITTED, TokenState.CONTEXT)
EDITING: States = (TokenState.MASKED, TokenState.COMMITTED, TokenState.EDITED, TokenState.CONTEXT)


def state_indices(masked: Tensor) -> Tensor:
    """Return the states of a bidirectional model's tokens as indices on its axis, int64 [...]; True is [MASK]."""
    return masked.logical_not().long()


def group_indices(state: Tensor) -> Tensor:
    """Return the paper's two groups of states as indices: 0 masked tokens, 1 all others, on every axis of states."""
    return state.clamp(max=1)


def of_groups(states: States) -> tuple[States, States]:
    """Return the states of the paper's two groups: masked, and all others."""
    return states[:1], states[1:]


def copy_indices(position_BL: Tensor) -> Tensor:
    """Return which copy of the text each token is of, from 0: positions that begin again are those of another.

    Padding, whose positions stand still, counts as copies too: compare those of real tokens only.
    """
    copy_BL = torch.zeros_like(position_BL)
    copy_BL[:, 1:] = (position_BL[:, 1:] <= position_BL[:, :-1]).cumsum(1)
    return copy_BL


def block_state_indices(
    masked_BL: Tensor, position_BL: Tensor, visible_BL: Tensor | None, block_length: int, states: States
) -> Tensor:
    """Return the states of block diffusion's tokens as indices on the axis of `states`, int64 [B, L].

    A block is being denoised where it holds a mask, where it is the row's last one, or where it stands in the noisy
    half of the layout [noisy ; clean]; all other blocks are context. Nothing behind a row's blocks changes their
    states, so that those of a pass with and without kept keys are the same.

    Args:
        masked_BL: True at [MASK].
        position_BL: of every token, [B, L] or [1, L]; blocks count from position 0.
        visible_BL: False on padding; None where nothing is padded.
        block_length: tokens of a block.
        states: `BLOCK_DIFFUSION` or `EDITING`.
    """
    real_BL = torch.ones_like(masked_BL) if visible_BL is None else visible_BL
    position_BL = position_BL.expand(masked_BL.shape)
    copy_BL, block_BL = copy_indices(position_BL), position_BL // block_length
    run_BL = torch.zeros_like(position_BL)  # which run of tokens of one block and copy
    same_BL = (block_BL[:, 1:] == block_BL[:, :-1]) & (copy_BL[:, 1:] == copy_BL[:, :-1])
    run_BL[:, 1:] = same_BL.logical_not().cumsum(1)
    masks_BL = torch.zeros_like(run_BL).scatter_add_(1, run_BL, (masked_BL & real_BL).long())
    holds_BL = masks_BL.gather(1, run_BL) > 0
    last_B1, last_run_B1 = (x.masked_fill(~real_BL, -1).amax(1, keepdim=True) for x in (copy_BL, run_BL))
    noisy_BL = real_BL & (copy_BL < last_B1)
    denoised_BL = holds_BL | noisy_BL | ((run_BL == last_run_B1) & ~noisy_BL.any(1, keepdim=True))
    state_BL = torch.full_like(run_BL, states.index(TokenState.CONTEXT))
    state_BL.masked_fill_(denoised_BL, states.index(TokenState.COMMITTED))
    if TokenState.EDITED in states:
        state_BL.masked_fill_(denoised_BL & ~holds_BL, states.index(TokenState.EDITED))
    return state_BL.masked_fill_(masked_BL, states.index(TokenState.MASKED))


def ratio_bins(ratio_B: Tensor, bins: int) -> Tensor:
    """Return the mask-ratio bin of each ratio, int64: (k/bins, (k+1)/bins] is bin k, and 0 is in bin 0.

    A ratio that lies on a bin's end up to its own dtype's rounding (float64, or float32 of a forward pass) is in it.
    """
    slack = 1e-9 if ratio_B.dtype == torch.float64 else 1e-6
    return (ratio_B * bins - slack).ceil().long().sub_(1).clamp_(0, bins - 1)


def gate_channels(width: int, d_m: int, d_u: int, device: torch.device | None = None) -> Tensor:
    """Return SGAT's gates keep_GD [2, D], float32: 1 where a group of states (`group_indices`) uses a channel, else 0.

    Channels are [shared | d_m that only masked tokens use | d_u that only unmasked tokens use]: one weight serves both
    (STaR-Quant, arXiv 2606.04945, SGAT: G_m and G_u are the diagonal matrices of the two rows). In block diffusion all
    tokens but [MASK] are the paper's unmasked ones.

    Args:
        width: D.
        d_m: channels of masked tokens only.
        d_u: channels of unmasked tokens only.
        device: of what is returned.
    """
    keep_GD = torch.ones(2, width, dtype=torch.float32, device=device)
    keep_GD[0, width - d_u :] = 0.0
    keep_GD[1, width - d_u - d_m : width - d_u] = 0.0
    return keep_GD
