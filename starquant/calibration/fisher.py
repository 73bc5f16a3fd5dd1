"""How much the likelihood of the model's own answers depends on every token and output of every linear.

Labels are drawn from the model at masked positions; g is the gradient of their log-likelihood at the output of a
linear. A token weighs sum_o g_to^2 over the linears that read one site, an output of a linear sum_t g_to^2: the
diagonals of the empirical Fisher information, the second-order cost of an error there.

Blocks run on the model's own weights, one batch at a time; what is held of a batch is what each block reads.
Shapes: B batch, L sequence, D model width, O outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from starquant.calibration.batches import CalibrationStates, StateBatch
from starquant.diffusion import MaskPredictor
from starquant.diffusion.sampling import log_probability, sample_tokens
from starquant.errors import DataError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.context import Context
from starquant.models.roles import LinearKey, Role, SiteKey
from starquant.session.progress import SILENT, Progress

#: Of the labels that are drawn.
SEED = 0


@dataclass
class BlockFisher:
    """Weights of one block.

    Attributes:
        tokens: of every site, a tensor [B, L] a batch, float32.
        outputs: of every linear, [O] in float64.
    """

    tokens: dict[SiteKey, list[Tensor]] = field(default_factory=dict)
    outputs: dict[LinearKey, Tensor] = field(default_factory=dict)


def fisher_weights(
    model: MaskedDiffusionModel, states: CalibrationStates, progress: Progress = SILENT
) -> list[BlockFisher]:
    """Return the weights of every block, by one forward and one backward pass over all states.

    Args:
        model: at full precision; not changed.
        states: what it is run on.
        progress: draws a bar over the batches.

    Raises:
        DataError: states without a masked position; gradients that are not finite.
    """
    if not any(bool((batch.ids_BL == states.mask_id).any()) for batch in states.batches):
        raise DataError("calibration.states: no position is masked, and Fisher weights need some")
    generator = torch.Generator().manual_seed(SEED)
    weights = [BlockFisher() for _ in model.trunk().blocks]
    for batch in progress.bar(states.batches, "Fisher weights", "batch"):
        _add_batch(model, batch, states.mask_id, generator, weights)
    return weights


def _add_batch(
    model: MaskedDiffusionModel,
    batch: StateBatch,
    mask_id: int,
    generator: torch.Generator,
    weights: list[BlockFisher],
) -> None:
    """Run one batch forward without and backward with gradients, block by block."""
    blocks, ids_BL = model.trunk().blocks, batch.ids_BL.to(model.device)
    context = batch.context(model)
    read: list[Tensor] = []
    with torch.no_grad():
        hidden_BLD = model.trunk().embedding(ids_BL)
        for block in blocks:
            read.append(hidden_BLD)
            hidden_BLD = block(hidden_BLD, context)
    masked_BL = (batch.ids_BL == mask_id) & batch.visible_BL
    gradient_BLD = _of_labels(model, hidden_BLD, masked_BL, batch.real_tokens(model.device), generator)
    for index in reversed(range(len(blocks))):
        gradient_BLD = _through(model, blocks[index], read.pop(), context, gradient_BLD, weights[index])


def _of_labels(
    model: MaskedDiffusionModel,
    hidden_BLD: Tensor,
    masked_BL: Tensor,
    visible_BL: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """Return the gradient of the drawn labels' log-likelihood at the last hidden states; logits some rows at a time."""
    predict = MaskPredictor(model)
    rows, columns = masked_BL.to(hidden_BLD.device).nonzero(as_tuple=True)
    columns = predict.source_columns(rows, columns, visible_BL)
    with torch.enable_grad():
        hidden_BLD = hidden_BLD.detach().requires_grad_(True)
        normed_BLD = model.trunk().norm(hidden_BLD)
        gradient_BLD = torch.zeros_like(normed_BLD)
        for at in zip(*(x.split(predict.positions_at_once()) for x in (rows, columns)), strict=True):
            normed_ND = normed_BLD.detach()[at].requires_grad_(True)
            logits_NV = model.project(normed_ND).float()
            u_N = torch.rand(len(logits_NV), generator=generator).to(logits_NV.device)
            label_N = sample_tokens(logits_NV.detach(), 1.0, u_N)
            (gradient_ND,) = torch.autograd.grad(log_probability(logits_NV, label_N).sum(), normed_ND)
            gradient_BLD.index_put_(at, gradient_ND, accumulate=True)  # two positions may be read off one
        (gradient_BLD,) = torch.autograd.grad(normed_BLD, hidden_BLD, gradient_BLD)
    return gradient_BLD


def _through(
    model: MaskedDiffusionModel,
    block: nn.Module,
    read_BLD: Tensor,
    context: Context,
    gradient_BLD: Tensor,
    weights: BlockFisher,
) -> Tensor:
    """Add what a block's linears weigh in one batch; return the gradient at what the block reads."""
    sites = model.block_sites(block)
    with torch.enable_grad(), _outputs(sites.linears) as outputs:
        read_BLD = read_BLD.detach().requires_grad_(True)
        out_BLD = block(read_BLD, context)
        gradients = torch.autograd.grad(
            out_BLD, [read_BLD, *outputs.values()], gradient_BLD, allow_unused=True, materialize_grads=True
        )
    tokens: dict[SiteKey, Tensor] = {}
    for role, gradient in zip(outputs, gradients[1:], strict=True):
        square_BLO = gradient.double().square()
        if not bool(square_BLO.isfinite().all()):
            raise DataError(f"Fisher weights: gradients at {role.value} of a block are not finite")
        tokens[role.site] = tokens.get(role.site, 0.0) + square_BLO.sum(-1)
        weights.outputs[role] = weights.outputs.get(role, 0.0) + square_BLO.flatten(0, -2).sum(0).cpu()
    for site, weight_BL in tokens.items():
        weights.tokens.setdefault(site, []).append(weight_BL.float().cpu())
    return gradients[0].detach()


@contextmanager
def _outputs(linears: Mapping[LinearKey, nn.Linear]) -> Iterator[dict[LinearKey, Tensor]]:
    """Collect what linears give while the context lasts."""
    outputs: dict[LinearKey, Tensor] = {}
    handles = [
        linear.register_forward_hook(lambda _, inputs, out, role=role: outputs.__setitem__(role, out))
        for role, linear in linears.items()
        if isinstance(role, Role)  # an expert reads some of the tokens only
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
