"""Fidelity on masked text: exact identities, and a slow recomputation from whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from starquant.calibration.batches import Segment
from starquant.config.calibration import StatesSpec
from starquant.diffusion import BatchSize
from starquant.errors import DataError
from starquant.evaluation.compared_rows import Fidelity
from starquant.evaluation.masked_fidelity import MaskedReference, measure_masked, take_masked_reference
from starquant.models import load_model
from starquant.models.base import MaskedDiffusionModel
from tests.support.models import perturbed
from tests.support.paths import GOLDEN

METRICS = ("top1_agreement", "kl", "confidence_drift", "confidence_bias", "hidden_mse")
STATES = StatesSpec(sampler="uniform", per_segment=3)


def segments(eos: int) -> list[Segment]:
    """Three of text, two of tasks whose answers end early."""
    text = [Segment(tuple(range(5 + i, 17 + 2 * i)), 1, "", "text") for i in range(3)]
    return text + [Segment((7, 8, 9 + i, 30, 31, eos, eos, eos), 3, "", "tasks") for i in range(2)]


def taken(model: MaskedDiffusionModel, batch_size: int = 4, **settings: Any) -> MaskedReference:
    eos = int(model.config.eos_token_id)
    return take_masked_reference(model, segments(eos), STATES, batch_size=BatchSize(batch_size), seed=0, **settings)


def measured(model: MaskedDiffusionModel, reference: MaskedReference, batch_size: int = 4) -> Fidelity:
    return measure_masked(model, reference, bins=4, resamples=100, seed=0, batch_size=BatchSize(batch_size))


def test_a_model_follows_itself_exactly(golden_model: MaskedDiffusionModel) -> None:
    found = measured(golden_model, taken(golden_model))
    assert {s.task for s in found.scores} == {"fidelity", "fidelity_tasks", "fidelity_text"}
    for score in found.scores:
        assert score.value == float(score.metric == "top1_agreement")


def test_against_whole_logits(golden_model: MaskedDiffusionModel) -> None:
    """One state at a time, without padding, in float64."""
    other, reference = perturbed(golden_model), taken(golden_model)
    rows = {(row["prompt"], row["step"]): row for row in measured(other, reference).items}
    assert len(rows) == len(reference.states)
    offset = golden_model.logit_offset
    for state in reference.states:
        ids_1L = state.ids_L[None]
        columns = state.columns_N + offset
        with torch.inference_mode():
            full, quantized = (m(ids_1L).logits[0, columns].double().log_softmax(1) for m in (golden_model, other))
        row = rows[state.segment, state.state]
        kl = (full.exp() * (full - quantized)).sum(1).mean()
        assert row["kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        assert row["top1_agreement"] == float((full.argmax(1) == quantized.argmax(1)).double().mean())


def test_what_is_measured(golden_model: MaskedDiffusionModel) -> None:
    """Masked positions of no prompt, and of end tokens the first one only; no more than asked for."""
    eos, mask = int(golden_model.config.eos_token_id), golden_model.mask_token_id
    own = segments(eos)
    for state in taken(golden_model).states:
        clean = torch.tensor(own[state.segment].ids)
        assert bool((state.ids_L[state.columns_N] == mask).all())
        assert int(state.columns_N.min()) >= own[state.segment].prompt_length
        assert int((clean[state.columns_N] == eos).sum()) <= 1
        masked = int((state.ids_L == mask).sum())
        assert state.ratio == masked / (len(clean) - own[state.segment].prompt_length)
    assert max(len(state.columns_N) for state in taken(golden_model, max_positions=2).states) == 2


def test_batch_size_changes_nothing(golden_model: MaskedDiffusionModel) -> None:
    other = perturbed(golden_model)
    one, many = (measured(other, taken(golden_model, size), size).items for size in (1, 15))
    for a, b in zip(one, many, strict=True):
        assert (a["prompt"], a["step"], a["doc_hash"]) == (b["prompt"], b["step"], b["doc_hash"])
        assert [a[m] for m in METRICS] == pytest.approx([b[m] for m in METRICS], rel=1e-3, abs=1e-5)


def test_groups_are_kept_apart(golden_model: MaskedDiffusionModel) -> None:
    found = measured(perturbed(golden_model), taken(golden_model))
    groups = found.by_group
    assert {*groups} == {"fidelity", "fidelity_text", "fidelity_tasks"}
    assert sorted(map(str, groups["fidelity"])) == sorted(map(str, groups["fidelity_text"] + groups["fidelity_tasks"]))
    by_task = {s.task: s.value for s in found.scores if s.filter == "all" and s.metric == "kl"}
    means = [sum(r["kl"] for r in found.items if r["prompt"] == p) for p in range(3)]
    counts = [sum(r["prompt"] == p for r in found.items) for p in range(3)]
    expected = sum(m / c for m, c in zip(means, counts, strict=True)) / 3
    assert by_task["fidelity_text"] == pytest.approx(expected)


def test_nothing_to_measure_is_named(golden_model: MaskedDiffusionModel) -> None:
    clean = StatesSpec(sampler="uniform", min_ratio=0.0, max_ratio=0.0)
    with pytest.raises(DataError, match=r"^fidelity\.source: it gives no segment with a masked token"):
        take_masked_reference(golden_model, [Segment((5, 6, 7), 1, "")], clean, batch_size=BatchSize(2), seed=0)


def test_block_diffusion_is_measured_as_it_generates() -> None:
    """Every block behind clean ones, against passes of one block each, in float64."""
    model = load_model(GOLDEN / "sdar_gqa")
    other, size, mask = perturbed(model), model.block_length, model.mask_token_id
    text = [Segment(tuple(range(5 + i, 17 + 2 * i)), prompt, "") for i, prompt in enumerate((1, 0, size + 1))]
    reference = take_masked_reference(model, text, STATES, batch_size=BatchSize(4), seed=0)
    rows = {(row["prompt"], row["step"]): row for row in measured(other, reference).items}
    assert len(rows) == len(reference.states) >= 6
    for state in reference.states:
        clean, positions = torch.tensor(text[state.segment].ids), state.positions_L
        assert positions is not None and bool((state.ids_L[state.columns_N] == mask).all())
        noisy = clean.clone()
        noisy[positions[: -len(clean)]] = state.ids_L[: -len(clean)]
        kl = []
        for column in positions[state.columns_N].tolist():
            begin = column // size * size
            ids = torch.cat((clean[:begin], noisy[begin : begin + size]))[None]
            with torch.inference_mode():
                full, quantized = (m(ids).logits[0, column].double().log_softmax(0) for m in (model, other))
            kl.append((full.exp() * (full - quantized)).sum())
        assert rows[state.segment, state.state]["kl"] == pytest.approx(float(sum(kl) / len(kl)), rel=1e-3, abs=1e-6)
