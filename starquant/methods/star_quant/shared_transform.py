"""STaR-Quant's transform of the residual stream, shared by all sites behind a norm and folded into the weights."""

from __future__ import annotations

import dataclasses

import torch

from starquant.calibration.batches import CalibrationStates
from starquant.calibration.site_statistics import Collect
from starquant.calibration.walk import walk
from starquant.config.bits import BitsSpec
from starquant.config.methods.star_quant import STaRQuantOptions
from starquant.methods.blockwise import Tensors
from starquant.methods.fitted import Fitted
from starquant.methods.quarot import QuaRot
from starquant.methods.star_quant.base_transform import divergence_named
from starquant.methods.star_quant.learned_transform import Watch, learn_shared
from starquant.methods.star_quant.sgat import closed_form
from starquant.methods.star_quant.site_transforms import groups_of, planned_gate
from starquant.models.base import MaskedDiffusionModel
from starquant.numerics import Rotation
from starquant.numerics.token_states import of_groups
from starquant.quantized.rewriting import rounded_once
from starquant.session.progress import SILENT, Progress


def fit_shared(
    method: QuaRot[STaRQuantOptions],
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
    options = method.options
    closed = options.transform.fit == "closed_form"
    width = model.trunk().embedding.embedding_dim
    groups, moments, gates = [], [torch.zeros(width, width, dtype=torch.float64) for _ in range(2)], []
    plan = Collect(moments=False, rows=2 * options.transform.rows, second_moment="state" if closed else None)
    exact = dataclasses.replace(states, inputs="full_precision")
    for visit in walk(model, exact, lambda hidden: method.embed(hidden, ends), progress):
        with rounded_once(visit.sites):
            method.fold(visit.sites, ends)
        for site, statistics in visit.collect(plan, tuple(visit.sites.norms)).items():
            gate = planned_gate(options, site, visit.index, width, bits)
            gates.append(gate)
            groups.append(groups_of(visit, site, statistics, bits, options, gate)[0])
            for total, state in zip(moments, of_groups(statistics.learned_states()), strict=True) if closed else ():
                total += statistics.second_moment(state).mean.cpu()
    if closed:
        masked_DD, unmasked_DD = moments
        learned_DD = closed_form(masked_DD, unmasked_DD, max((gate.widths for gate in gates), key=sum))
    elif groups[0].rounds:
        with divergence_named("residual stream"):
            learned_DD = learn_shared(groups, options.transform, Watch(progress, "residual stream"))
    else:
        learned_DD = torch.eye(width, dtype=torch.float64)
    rotation = Rotation.from_tensors(ends)
    assert rotation is not None
    matrix_DD = rotation.apply(torch.eye(width, dtype=torch.float64)) @ learned_DD.cpu()
    fitted.report.append({"block": None, "site": "residual stream", "width": width, "structure": "shared"})
    return Rotation(matrix_DD=matrix_DD).to_tensors()
