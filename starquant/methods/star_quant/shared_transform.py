"""STaR-Quant's transform of the residual stream, shared by all sites behind a norm and folded into the weights."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from starquant.config.bits import BitsSpec
from starquant.methods.blockwise import Tensors
from starquant.methods.fitted import Fitted
from starquant.methods.star_quant.sgat import closed_form
from starquant.methods.star_quant.site_transforms import asked_gate, groups_of
from starquant.session.progress import SILENT, Progress

if TYPE_CHECKING:
    from starquant.calibration.batches import CalibrationStates
    from starquant.methods.star_quant.method import STaRQuant
    from starquant.models.base import MaskedDiffusionModel


def fit_shared(
    method: STaRQuant,
    model: MaskedDiffusionModel,
    bits: BitsSpec,
    states: CalibrationStates,
    ends: Tensors,
    fitted: Fitted,
    progress: Progress = SILENT,
) -> Tensors:
    """Return the residual rotation R P, P fitted to all sites behind a norm at once.

    Learned, every step of Adam sees one site, in turn; the rewritten weights of all of them are held meanwhile.
    """
    import torch

    from starquant.calibration.site_statistics import Collect, TokenState
    from starquant.calibration.walk import walk
    from starquant.methods.star_quant.base_transform import learn_shared
    from starquant.numerics import Rotation
    from starquant.quantized.rewriting import rounded_once

    options = method.options
    closed = options.transform.fit == "closed_form"
    width = model.trunk().embedding.embedding_dim
    groups, moments, gates = [], [torch.zeros(width, width, dtype=torch.float64) for _ in range(2)], []
    plan = Collect(moments=False, rows=2 * options.transform.rows, second_moment="state" if closed else None)
    exact = dataclasses.replace(states, inputs="full_precision")
    for visit in walk(model, exact, lambda hidden: method.embed(hidden, ends), progress):
        with rounded_once(visit.block):
            method.fold(visit.sites, ends)
        for site, statistics in visit.collect(plan, tuple(visit.sites.norms)).items():
            gate = asked_gate(options, site, visit.index, width, bits)
            gates.append(gate)
            groups.append(groups_of(visit, site, statistics, bits, options, gate)[0])
            for total, state in zip(moments, TokenState, strict=True):
                if closed:
                    total += statistics.second_moment(state).mean.cpu()
    if closed:
        widest = max(gates, key=lambda gate: sum(gate.widths)).widths
        found = closed_form(*moments, widest)
    elif bits.full_precision:  # there is no error to learn from
        found = torch.eye(width, dtype=torch.float64)
    else:
        found = learn_shared(groups, torch.eye(width, dtype=torch.float64), options.transform, progress)
    rotation = Rotation.from_tensors(ends)
    assert rotation is not None
    matrix_DD = rotation.apply(torch.eye(width, dtype=torch.float64)) @ found.cpu()
    fitted.report.append({"block": None, "site": "residual stream", "width": width, "structure": "shared"})
    return Rotation(matrix_DD=matrix_DD).to_tensors()
