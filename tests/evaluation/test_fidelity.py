"""Fidelity: exact identities of a model with itself, and a slow recomputation state by state for a perturbed one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from starquant.diffusion import BatchSize, DreamSampler, LLaDASampler, SDARSampler, generate
from starquant.errors import ConfigError, DataError, NonFiniteError
from starquant.evaluation import testbed_tasks
from starquant.evaluation.fidelity import Fidelity, Reference, measure, take_reference
from starquant.evaluation.trajectory_metrics import (
    METRICS,
    bin_name,
    commit_flips,
    compare_logits,
    measured_positions,
    summarize,
)
from starquant.models import load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.quantized.install import install
from starquant.testbed.items import Split
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.models import perturbed
from tests.support.specs import spec

PROMPTS = [[7, 8, 9], [11, 12, 13, 14, 15, 16], [42], [5, 5, 5, 6]]
STATE_METRICS = list(METRICS)[:6]
SAMPLERS = {
    "llada_mha": [
        LLaDASampler(8, 8, 8),
        LLaDASampler(8, 8, 4, cfg_scale=0.5, temperature=0.7),
        LLaDASampler(16, 8, 4, remasking="random", confidence_eos_eot_inf=True),
    ],
    "dream_gqa": [
        DreamSampler(8, 8, top_k=None),
        DreamSampler(5, 8, alg="topk_margin", temperature=0.8, alg_temp=0.5),
        DreamSampler(12, 8, alg="origin", temperature=1.0),
    ],
}


def reference(model: MaskedDiffusionModel, sampler: Any, batch_size: int = 3, **settings: Any) -> Reference:
    return take_reference(model, PROMPTS, sampler, batch_size=BatchSize(batch_size), seed=3, **settings)


def fidelity(model: MaskedDiffusionModel, taken: Reference, batch_size: int = 3) -> Fidelity:
    return measure(model, taken, bins=4, resamples=200, seed=0, batch_size=BatchSize(batch_size))


def overall(found: Fidelity) -> dict[str, float]:
    return {s.metric: s.value for s in found.scores if s.filter == "all"}


@pytest.mark.parametrize("which", range(3))
def test_a_model_follows_itself_exactly(family: str, golden_model, which: int) -> None:
    """Random draws included: teacher forcing repeats those of full precision."""
    found = fidelity(golden_model, reference(golden_model, SAMPLERS[family][which]))
    assert overall(found) == {name: float(name in ("top1_agreement", "same_answer")) for name in METRICS}
    for score in found.scores:
        assert (score.stderr, score.ci_low, score.ci_high) == (0.0, score.value, score.value)


def slow_rows(full: MaskedDiffusionModel, other: MaskedDiffusionModel, prompt: list[int], sampler: Any) -> Iterator:
    """Yield (step, metrics) of one prompt, unpadded, one state at a time, from whole logits in float64."""
    states: list[Tensor] = []
    start = torch.tensor([prompt])
    generate(full, start, sampler, on_step=lambda _, ids, __: states.append(ids[0].clone()))
    ids = torch.cat((start[0], torch.full((sampler.answer_length,), 500)))
    for step, after in enumerate(states):
        masked = [i for i in range(len(ids)) if ids[i] == 500]
        p, q = (predictions(model, ids) for model in (full, other))
        h, g = (residual(model, ids) for model in (full, other))
        tops = {i: int(p[i].argmax()) for i in masked}
        biases = [float(q[i][tops[i]] - p[i][tops[i]]) for i in masked]
        committed = {(i, int(after[i])) for i in masked if after[i] != 500}
        if isinstance(sampler, LLaDASampler):
            block = step // (sampler.steps // sampler.blocks)
            open_to = len(prompt) + (block + 1) * sampler.block_length
            surest = {i: float(q[i].max()) for i in masked if i < open_to}
        else:
            surest = {i: float((q[i] * q[i].log()).sum()) for i in masked}
        order = sorted(surest, key=lambda i: -surest[i])[: len(committed)]
        others = {(i, int(q[i].argmax())) for i in order}
        n = len(masked)
        yield (
            step,
            {
                "top1_agreement": sum(int(q[i].argmax()) == tops[i] for i in masked) / n,
                "kl": sum(float((p[i] * (p[i].log() - q[i].log())).sum()) for i in masked) / n,
                "confidence_drift": sum(map(abs, biases)) / n,
                "confidence_bias": sum(biases) / n,
                "hidden_mse": sum(float((g[i] - h[i]).norm() ** 2) for i in masked)
                / sum(float(h[i].norm() ** 2) for i in masked),
                "commit_flips": 1 - len(committed & others) / len(committed),
            },
        )
        ids = after


@torch.no_grad()
def predictions(model: MaskedDiffusionModel, ids: Tensor) -> Tensor:
    """Return p(token at i) [L, V]: Dream predicts position i at i - 1, the first at itself."""
    logits = model(input_ids=ids[None]).logits[0].double()
    return shifted(model, logits).softmax(1)


@torch.no_grad()
def residual(model: MaskedDiffusionModel, ids: Tensor) -> Tensor:
    caught: list[Tensor] = []
    hook = model.trunk().norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0][0]))
    model(input_ids=ids[None])
    hook.remove()
    return shifted(model, caught[0].double())


def shifted(model: MaskedDiffusionModel, x: Tensor) -> Tensor:
    return torch.cat((x[:1], x[:-1])) if type(model).__name__ == "DreamModel" else x


def test_against_a_slow_recomputation(family: str, golden_model) -> None:
    sampler = LLaDASampler(4, 8, 4) if family == "llada_mha" else DreamSampler(4, 8, top_k=None)
    other = perturbed(golden_model, 0.1)
    found = fidelity(other, reference(golden_model, sampler))
    rows = {(row["prompt"], row["step"]): row for row in found.items}
    seen, flips = 0, 0.0
    for index, prompt in enumerate(PROMPTS):
        for step, expected in slow_rows(golden_model, other, prompt, sampler):
            got = rows[index, step]
            for name, value in expected.items():
                assert got[name] == pytest.approx(value, rel=1e-3, abs=2e-6), (index, step, name)
            seen, flips = seen + 1, flips + expected["commit_flips"]
        answers = [
            generate(model, torch.tensor([prompt]), sampler)[0, len(prompt) :] for model in (golden_model, other)
        ]
        differ = float((answers[0] != answers[1]).double().mean())
        assert rows[index, None]["answer_flips"] == pytest.approx(differ)
        assert rows[index, None]["same_answer"] == float(differ == 0)
    assert seen == len(found.items) - len(PROMPTS) == 16
    assert 0 < flips < seen
    assert 0 < overall(found)["top1_agreement"] < 1


@pytest.mark.parametrize("which", range(3))
def test_batch_size_changes_nothing(family: str, golden_model, which: int) -> None:
    other, sampler = perturbed(golden_model), SAMPLERS[family][which]
    together = fidelity(other, reference(golden_model, sampler, batch_size=4), batch_size=4)
    alone = fidelity(other, reference(golden_model, sampler, batch_size=1), batch_size=1)
    assert len(together.items) == len(alone.items)
    for a, b in zip(together.items, alone.items, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            same = a[name] if isinstance(a[name], str | None) else pytest.approx(a[name], rel=1e-3, abs=1e-6)
            assert b[name] == same, name


def test_states_in_which_nothing_is_committed_are_left_out(family: str, golden_model) -> None:
    """Twice as many steps as tokens: every second state is the one before it."""
    sampler = LLaDASampler(16, 8, 8) if family == "llada_mha" else DreamSampler(40, 8)
    found = fidelity(golden_model, reference(golden_model, sampler))
    ratios = [row["mask_ratio"] for row in found.items if row["prompt"] == 0 and row["step"] is not None]
    assert len(ratios) == len(set(ratios)) <= 8
    assert ratios[0] == 1.0 and min(ratios) > 0


def test_at_most_max_positions_are_kept_a_state(golden_model, family: str) -> None:
    taken = reference(golden_model, SAMPLERS[family][0], max_positions=3)
    assert max(len(h) for p in taken.prompts for h in p.residual.values()) == 3
    assert overall(fidelity(golden_model, taken))["kl"] == 0.0


def test_rotated_residual_streams_are_compared_in_the_original_basis(golden_model, family: str) -> None:
    taken = reference(golden_model, SAMPLERS[family][0])
    golden_model.to_original_basis = lambda hidden: 3 * hidden
    found = overall(fidelity(golden_model, taken))
    assert found["hidden_mse"] == pytest.approx(4.0)  # ||3h - h||^2 / ||h||^2
    assert found["kl"] == 0.0


def test_fewer_bits_follow_less_closely(tiny_tokenizer) -> None:
    items = [item for task in ("facts", "arithmetic") for item in testbed_tasks.items(task, Split.VALIDATION)[:12]]
    prompts = [tiny_tokenizer(item.prompt, add_special_tokens=False)["input_ids"] for item in items]
    taken = take_reference(
        load_model(weights_folder(0)), prompts, LLaDASampler(8, 8, 8), batch_size=BatchSize(24), seed=0
    )
    found = {}
    for bits in ("w8a8", "w4a4", "w3a3"):
        model = load_model(weights_folder(0))
        install(model, spec(f"bits={bits}").bits)
        found[bits] = overall(fidelity(model, taken, batch_size=24))
    for metric in ("kl", "confidence_drift", "hidden_mse", "commit_flips", "answer_flips"):
        assert found["w8a8"][metric] < found["w4a4"][metric] < found["w3a3"][metric], metric
    for metric in ("top1_agreement", "same_answer"):
        assert found["w8a8"][metric] > found["w4a4"][metric] > found["w3a3"][metric], metric


def test_scores_are_means_over_prompts_of_means_over_states() -> None:
    items = [
        {"prompt": 0, "step": 0, "mask_ratio": 1.0, "kl": 1.0},
        {"prompt": 0, "step": 1, "mask_ratio": 0.5, "kl": 3.0},
        {"prompt": 1, "step": 0, "mask_ratio": 1.0, "kl": 6.0},
        {"prompt": 1, "step": None, "mask_ratio": None, "same_answer": 1.0},
    ]
    found = {(s.metric, s.filter): s for s in summarize(items, 2, 100, 0)}
    assert set(found) == {
        ("kl", "all"),
        ("same_answer", "all"),
        ("kl", "mask_ratio_0.00_0.50"),
        ("kl", "mask_ratio_0.50_1.00"),
    }
    whole = found["kl", "all"]
    assert (whole.value, whole.n, whole.unit, whole.higher_is_better) == (4.0, 2, "nats", False)
    assert (whole.ci_low, whole.ci_high) == (2.0, 6.0)
    assert found["kl", "mask_ratio_0.50_1.00"].value == 3.5
    lone = found["kl", "mask_ratio_0.00_0.50"]
    assert (lone.value, lone.n, lone.stderr, lone.ci_low) == (3.0, 1, None, None)


def test_mask_ratio_bins_are_closed_above() -> None:
    for masked in range(1, 257):
        rows = [{"prompt": 0, "step": 0, "mask_ratio": masked / 256, "kl": 0.0}]
        names = [s.filter for s in summarize(rows, 4, 10, 0)]
        assert names == ["all", bin_name((masked - 1) // 64, 4)]
    assert len({bin_name(k, 200) for k in range(200)}) == 200


def test_metrics_of_known_distributions() -> None:
    full, other = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    found = {name: float(value) for name, value in compare_logits(full, other).items()}
    expected = {"top1_agreement": 0, "kl": 0.25 * 0.6931472, "confidence_drift": 0.25, "confidence_bias": -0.25}
    assert found == pytest.approx(expected, abs=1e-6)


def test_commit_flips_compare_positions_and_tokens() -> None:
    before = torch.tensor([[9, 9, 9, 1], [9, 9, 9, 9]])
    full = torch.tensor([[2, 3, 9, 1], [9, 9, 9, 9]])
    other = torch.tensor([[2, 9, 3, 1], [9, 9, 9, 9]])
    assert commit_flips(before, full, other, 9).tolist() == [0.5, 0.0]  # another position
    other[0, 1], other[0, 2] = 4, 9
    assert commit_flips(before, full, other, 9).tolist() == [0.5, 0.0]  # another token


def test_measured_positions_are_spread_evenly() -> None:
    before = torch.full((2, 10), 9)
    before[0, 0] = 1
    after = before.clone()
    after[0, 5] = 2  # the other row commits nothing
    rows, columns = measured_positions(before, after, 9, 3)
    assert rows.tolist() == [0, 0, 0]
    assert columns.tolist() == [2, 5, 8]  # the middles of three equal parts
    reach_BG = SDARSampler(10, 4).reach(before, torch.tensor([6] * len(before)), 9)  # its blocks end at 2, 6, 10
    assert measured_positions(before, after, 9, 9, reach_BG)[1].tolist() == [1]
    short_BG = SDARSampler(10, 4).reach(torch.full((1, 10), 9), torch.tensor([7]), 9)  # 17 tokens: 16 are whole blocks
    assert short_BG[0].nonzero()[:, 0].tolist() == [0]
    late = torch.tensor([[1] * 9 + [9]])
    assert not bool(SDARSampler(10, 4).reach(late, torch.tensor([7]), 9).any())
    assert measured_positions(before, after, 9, 9)[1].tolist() == list(range(1, 10))


def test_bad_input_is_named(golden_model, family: str) -> None:
    sampler = SAMPLERS[family][0]
    for prompts, error, message in (
        ([], DataError, "no prompts"),
        ([[1], []], DataError, "prompt 1 is empty"),
        ([[1, 500]], DataError, r"prompt 0 .* holds \[MASK\]"),
        ([[1] * golden_model.config.context_length], ConfigError, r"fidelity\.source\.length: prompt 0"),
    ):
        with pytest.raises(error, match=message):
            take_reference(golden_model, prompts, sampler, batch_size=BatchSize(2), seed=0)
    taken = reference(golden_model, sampler)
    with torch.no_grad():
        golden_model.trunk().norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="the last norm's output is not finite"):
        fidelity(golden_model, taken)
