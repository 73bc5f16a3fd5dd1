"""Choosing tokens from logits and positions from confidences; N masked positions of a batch at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probability(logits_NV: Tensor, token_N: Tensor) -> Tensor:
    """Return log softmax(logits) at one token each, [N]."""
    return -F.cross_entropy(logits_NV, token_N, reduction="none")


def sample_tokens(logits_NV: Tensor, temperature: float, u_N: Tensor | None = None) -> Tensor:
    """Return a token for each position, [N], from softmax(logits / temperature); greedy at temperature 0.

    `u_N` are uniform draws, one a position (`rowwise_uniform`); greedy needs none.

    LLaDA's official code takes the argmax of exp(l) / (-log u)^T with one u a vocabulary entry, which has this
    distribution (Gumbel-max); the inverse of the distribution function needs one u a position.
    """
    if temperature == 0.0 or u_N is None:
        return logits_NV.argmax(1)
    cumulative_NV = (logits_NV / temperature).softmax(1).cumsum(1)
    u_N1 = u_N[:, None].to(cumulative_NV.dtype) * cumulative_NV[:, -1:]
    token_N = torch.searchsorted(cumulative_NV, u_N1, right=True)[:, 0]
    return token_N.clamp_max(logits_NV.shape[1] - 1)


def sample_dream(
    logits_NV: Tensor,
    alg: str,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    u_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (token [N], confidence [N]) as Dream's `sample_tokens`."""
    greedy = temperature == 0 and (top_p is None or top_p >= 1)
    if greedy and top_k is not None and 4 * top_k < logits_NV.shape[1]:
        best = logits_NV.topk(4 * top_k, dim=1)
        kept_NK = best.values >= best.values[:, top_k - 1 : top_k]
        if not bool(kept_NK[:, -1].any()):  # else some logits equal to the k-th may be missing
            return _greedy_of(best.values.masked_fill(~kept_NK, -torch.inf), best.indices, alg)
    if temperature > 0:
        logits_NV = logits_NV / temperature
    if top_p is not None and top_p < 1:
        logits_NV = _nucleus(logits_NV, top_p)
    if top_k is not None:
        kth = logits_NV.topk(min(top_k, logits_NV.shape[1]), dim=1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < kth, -torch.inf)
    token = sample_tokens(logits_NV, float(temperature > 0), u_N)  # the temperature is in the logits
    probs_NV = logits_NV.softmax(1)
    return token, _confidence(probs_NV, probs_NV.gather(1, token[:, None])[:, 0], alg)


def _greedy_of(logits_NK: Tensor, index_NK: Tensor, alg: str) -> tuple[Tensor, Tensor]:
    """Return (token, confidence) from the candidates alone: all other tokens have no probability.

    Of equally likely tokens the first one of the vocabulary is taken, as `argmax` does.
    """
    last = torch.iinfo(index_NK.dtype).max
    token = index_NK.masked_fill(logits_NK < logits_NK[:, :1], last).amin(1)
    probs_NK = logits_NK.softmax(1)
    return token, _confidence(probs_NK, probs_NK[:, 0], alg)


def _confidence(probs_NV: Tensor, likeliest_N: Tensor, alg: str) -> Tensor:
    if alg == "topk_margin":
        top = probs_NV.topk(2, dim=1).values
        return top[:, 0] - top[:, 1]
    return (probs_NV * torch.log(probs_NV + 1e-10)).sum(1) if alg == "entropy" else likeliest_N


def top_ranked(
    confidence_N: Tensor, rows_N: Tensor, columns_N: Tensor, shape: torch.Size, commit_B: Tensor | int
) -> Tensor:
    """Mark, in every row, its `commit_B` most confident positions, one number a row or one for all, bool [N].

    Ties go to the left.
    """
    grid_BL = torch.full(tuple(shape), -torch.inf, dtype=confidence_N.dtype, device=confidence_N.device)
    grid_BL[rows_N, columns_N] = confidence_N
    order_BL = grid_BL.argsort(dim=1, descending=True, stable=True)
    chosen_BL = torch.zeros_like(order_BL, dtype=torch.bool)
    if isinstance(commit_B, int):
        chosen_BL.scatter_(1, order_BL[:, :commit_B], True)
    else:
        first_BL = torch.arange(shape[1], device=order_BL.device) < commit_B[:, None]
        chosen_BL.scatter_(1, order_BL, first_BL)
    return chosen_BL[rows_N, columns_N]


def joined(parts: list[Tensor]) -> Tensor:
    """Return parts as one; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def commit(ids_BL: Tensor, at: tuple[Tensor, Tensor], token_N: Tensor, chosen_N: Tensor) -> None:
    """Write the tokens of chosen places, in place; a GPU is not waited for, which picking out the chosen would do."""
    ids_BL[at] = torch.where(chosen_N, token_N, ids_BL[at])


def surest(
    places: tuple[Tensor, Tensor], probability_N: Tensor, shape: torch.Size, threshold: float, fewest: int
) -> Tensor:
    """Mark, of each row's places, those above a threshold, or its `fewest` surest ones where these are fewer.

    Args:
        places: (rows [N], columns [N]).
        probability_N: of the token at each of them.
        shape: of the canvas.
        threshold: 1 or more for none above it.
        fewest: of each row; all that it has where it has fewer.
    """
    if threshold >= 1.0:
        return top_ranked(probability_N, *places, shape, fewest)
    above_N = probability_N > threshold
    enough_B = torch.bincount(places[0][above_N], minlength=shape[0]) >= fewest
    return torch.where(enough_B[places[0]], above_N, top_ranked(probability_N, *places, shape, fewest))


def _nucleus(logits_NV: Tensor, top_p: float) -> Tensor:
    ordered, index = logits_NV.sort(1, descending=True)
    cumulative = ordered.softmax(1).cumsum(1)
    drop = cumulative > top_p
    drop = torch.cat((torch.zeros_like(drop[:, :1]), drop[:, :-1]), dim=1)  # keep the token that crosses
    return logits_NV.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), -torch.inf)


def rowwise_uniform(rows_N: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Return float64 uniforms [N], each row of the batch drawing from its own generator.

    A row's draws depend on how many of its positions are masked, not on padding or on the rest of the batch.
    """
    counts = torch.bincount(rows_N, minlength=len(generators)).tolist()
    draws = [
        torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
        for count, generator in zip(counts, generators, strict=True)
    ]
    return torch.cat(draws).to(rows_N.device)
