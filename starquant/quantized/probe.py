"""Measure what dynamic quantization loses at every site and operand, on a small probe."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from starquant.models.base import MaskedDiffusionModel
from starquant.numerics import SqnrMeter
from starquant.quantized.activation_quantizer import ActivationQuantizer
from starquant.quantized.attention import QuantizedAttentionCore
from starquant.store.manifest import ManifestEntry

PROBE_ROWS, PROBE_LENGTH = 4, 64


@torch.inference_mode()
def measure_operands(
    model: MaskedDiffusionModel, entries: Sequence[ManifestEntry], seed: int = 0
) -> list[ManifestEntry]:
    """Return the manifest with the SQNR of activations and attention operands filled in.

    The probe is `PROBE_ROWS` sequences of uniformly drawn tokens with mask ratios spread from 1/8 to 7/8: no
    data is needed, and figures of two runs compare. Errors of earlier blocks are part of what later ones see.
    """
    sites = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantizer) and module.format.quantizes
    }
    cores = {
        name.removesuffix(".core"): module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedAttentionCore)
    }
    if not sites and not cores:
        return list(entries)
    for site in sites.values():
        site.meter = SqnrMeter()
    for core in cores.values():
        core.meters = {operand: SqnrMeter() for operand in core.formats}
    try:
        model(_probe(model, seed).to(model.device), logit_positions=(torch.tensor([0]), torch.tensor([0])))
        sqnr = {name: site.meter.value() for name, site in sites.items() if site.meter}
        sqnr |= {f"{n}.{operand}": m.value() for n, core in cores.items() for operand, m in (core.meters or {}).items()}
    finally:
        for site in sites.values():
            site.meter = None
        for core in cores.values():
            core.meters = None
    return [entry.model_copy(update={"activation_sqnr_db": _lookup(sqnr, entry)}) for entry in entries]


def _lookup(sqnr: dict[str, float | None], entry: ManifestEntry) -> float | None:
    return sqnr.get(entry.name if entry.kind == "operand" else entry.site or "")


def _probe(model: MaskedDiffusionModel, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    length = min(PROBE_LENGTH, model.config.context_length)
    ids = torch.randint(0, model.config.vocab_size, (PROBE_ROWS, length), generator=generator)
    ratio = (torch.arange(PROBE_ROWS) * 2 + 1) / (2 * PROBE_ROWS)
    masked = torch.rand(ids.shape, generator=generator) < ratio[:, None]
    return ids.masked_fill(masked, model.mask_token_id)
