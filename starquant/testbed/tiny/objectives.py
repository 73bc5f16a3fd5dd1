"""What the embedded models are trained on: batches of items, and the masked-diffusion losses of their families.

Shape suffixes: B samples, L columns, M columns of the noisy blocks, X blocks, E tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.models.experts import Router
from starquant.testbed.items import ANSWER_LENGTH, Item
from starquant.testbed.tiny.tokenizer import EOS, vocabulary

#: Ids [B, L], real-token mask [B, L] and answer mask [B, L], padded on the right.
Batch = tuple[Tensor, Tensor, Tensor]

ANSWER_ONLY = 0.9  # share of samples masked in the answer only; the others anywhere
BALANCE = 0.001  # weight of the experts' load balance; our choice


def encode(items: list[Item], pad_answer: bool, block_length: int = 1) -> Batch:
    """Return a batch of items.

    Args:
        items: prompts and answers.
        pad_answer: with ends of text, to `ANSWER_LENGTH` and on to the end of the last block.
        block_length: tokens of a block, which count from the prompt's start.
    """
    words = vocabulary()
    rows, starts = [], []
    for item in items:
        prompt, answer = item.prompt.split(), item.answer.split()
        if pad_answer:
            answer += [EOS] * (ANSWER_LENGTH - len(answer))
            answer += [EOS] * (-(len(prompt) + len(answer)) % block_length)
        rows.append([words[w] for w in prompt + answer])
        starts.append(len(prompt))
    lengths = torch.tensor([len(row) for row in rows])
    column = torch.arange(int(lengths.max()))
    ids = torch.tensor([row + [words[EOS]] * (len(column) - len(row)) for row in rows])
    real = column < lengths[:, None]
    return ids, real, real & (column >= torch.tensor(starts)[:, None])


def masked_loss(model: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """Sum over samples of the mean cross-entropy at l ~ U{1..n} masked tokens.

    This is the expectation of the 1/t-weighted masked-diffusion loss (LLaDA, eq. 3) at far lower variance.
    """
    ids, real, _ = batch
    masked, level = draw_masked(batch, generator)
    device = model.device
    noisy = torch.where(masked, model.mask_token_id, ids).to(device)
    rows, columns = masked.nonzero(as_tuple=True)
    positions = (rows.to(device), columns.to(device))
    logits = model(noisy, attention_mask=real.to(device), logit_positions=positions).logits
    loss = F.cross_entropy(logits.float(), ids[masked].to(device), reduction="none")
    return (loss / level[rows].to(device)).sum()


def draw_masked(batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw l ~ U{1..n} masked tokens a sample; returns which [B, L], and how many [B]."""
    ids, real, answer = batch
    anywhere = torch.rand(len(ids), 1, generator=generator) >= ANSWER_ONLY
    return _some_of(torch.where(anywhere, real, answer), generator)


def _some_of(maskable: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw l ~ U{1..n} of the n maskable tokens of every row; returns which, and how many (1 of none)."""
    level = (torch.rand(len(maskable), generator=generator) * maskable.sum(1)).long() + 1
    order = torch.rand(maskable.shape, generator=generator).masked_fill(~maskable, 2.0).argsort(1).argsort(1)
    return maskable & (order < level[:, None]), level


def balanced_masked_loss(model: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return `masked_loss`, and for every sample `BALANCE` times the experts' load balance, averaged over layers."""
    with load_balance(model) as balances:
        loss = masked_loss(model, batch, generator)
    return loss + BALANCE * len(batch[0]) * torch.stack(balances).mean()


@contextmanager
def load_balance(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the load balance of every router that runs inside: E sum_e f_e P_e, 1 where all experts are alike.

    f_e is the share of choices that fall on expert e, P_e its mean probability (Switch Transformer, arXiv 2101.03961,
    eq. 4). Padding counts as other tokens do.
    """
    balances: list[Tensor] = []

    def measure(router: Router, _: Any, logits_BLE: Tensor) -> None:
        probability_TE = logits_BLE.float().softmax(-1).flatten(0, -2)
        chosen = probability_TE.topk(router.top_k, -1).indices.flatten()
        share_E = torch.bincount(chosen, minlength=router.out_features) / len(chosen)
        balances.append(router.out_features * (share_E * probability_TE.mean(0)).sum())

    routers = [part for part in module.modules() if isinstance(part, Router)]
    hooks = [router.register_forward_hook(measure) for router in routers]
    try:
        yield balances
    finally:
        for hook in hooks:
            hook.remove()


def block_loss(model: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """Sum over samples of the expectation of SDAR's loss, at lower variance, averaged over the answer's tokens.

    SDAR masks answer tokens with probability p, p ~ U(0, 1) but for a floor of 1e-3, and weighs their cross-entropies
    by 1 / p. What a block loses depends on its own masks alone, so that each of the answer's blocks may draw its own:
    l ~ U{1..n} of its n answer tokens, weighed by n / l, has the same expectation. The pass reads [noisy ; clean]; of
    the noisy half only blocks of the answer, since nothing else reads the others.
    """
    ids_BL, real_BL, answer_BL = batch
    length = model.block_length
    first_B1 = (answer_BL.int().argmax(1, keepdim=True) // length) * length
    blocks = -(-int((real_BL.sum(1, keepdim=True) - first_B1).max()) // length)
    position_BM = first_B1 + torch.arange(blocks * length)
    column_BM = position_BM.clamp_max(ids_BL.shape[1] - 1)
    clean_BM, inside_BM = ids_BL.gather(1, column_BM), position_BM < ids_BL.shape[1]
    target_BM = answer_BL.gather(1, column_BM) & inside_BM
    masked_BM, weight_BM = _masked_in_blocks(target_BM, length, generator)
    noisy_BM = clean_BM.masked_fill(masked_BM, model.mask_token_id)
    rows, columns = masked_BM.nonzero(as_tuple=True)
    device = model.device
    logits = model(
        torch.cat((noisy_BM, ids_BL), 1).to(device),
        attention_mask=torch.cat((real_BL.gather(1, column_BM) & inside_BM, real_BL), 1).to(device),
        position_ids=torch.cat((position_BM, torch.arange(ids_BL.shape[1]).expand_as(ids_BL)), 1).to(device),
        logit_positions=(rows.to(device), columns.to(device)),
    ).logits
    loss = F.cross_entropy(logits.float(), clean_BM[masked_BM].to(device), reduction="none")
    weight = weight_BM[masked_BM] / target_BM.sum(1)[rows]
    total: Tensor = (loss * weight.to(device)).sum()
    return total


def _masked_in_blocks(target_BM: Tensor, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return l ~ U{1..n} masked ones of the n targets of every block, and n / l, each [B, M]."""
    target_XE = target_BM.reshape(-1, length)
    masked_XE, level_X = _some_of(target_XE, generator)
    weight_XE = (target_XE.sum(1) / level_X)[:, None].expand_as(target_XE)
    return masked_XE.reshape(target_BM.shape), weight_XE.reshape(target_BM.shape)
