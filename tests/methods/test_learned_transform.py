"""Steps over batches of tokens: what they see, what their losses add up to, with which products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from starquant.config.methods.star_quant import TransformOptions
from starquant.methods.fitted import ENDS, block_part
from starquant.methods.star_quant.base_transform import Group, Transform, output_errors
from starquant.methods.star_quant.learned_transform import _Batches, _Loss, learn
from starquant.numerics import PerChannel, PerToken, QuantFormat, dual
from starquant.session.progress import Progress
from tests.support.methods import method_named
from tests.support.models import fresh
from tests.support.states import states_of

FOUR = QuantFormat(4, True, PerChannel()), QuantFormat(4, True, PerToken())


def group_of(counts: tuple[int, int], gate: tuple[int, int] = (2, 3)) -> Group:
    generator = torch.Generator().manual_seed(5)
    rows = tuple(torch.randn(n, 32, generator=generator) for n in counts)
    weights = [torch.randn(n, 32, generator=generator) for n in (24, 8)]
    return Group(weights, rows, *FOUR, gate, True)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["identity", "dense", "kronecker", "invertible"])
@pytest.mark.parametrize("counts", [(64, 64), (64, 16), (48, 128)])
def test_losses_of_batches_have_the_objective_as_their_mean(counts: tuple[int, int], start: str) -> None:
    """Over as many steps as it takes to see every row of both states equally often, from wherever P starts."""
    torch.manual_seed(3)
    group, clip = group_of(counts), torch.tensor([0.9, 0.7])
    sizes = (4, 8) if start == "kronecker" else (32,)
    rotations, factors = ([torch.linalg.qr(torch.randn(n, n).double())[0] for n in sizes] for _ in range(2))
    if start == "invertible":
        factors = [factors[0] @ torch.diag(torch.linspace(0.5, 2.0, 32).double())]
    begun = Transform(factors, [dual(factor) for factor in factors] if start == "invertible" else ())
    whole = Transform(rotations) if start == "identity" else begun.turned(rotations)
    loss_of = _Loss(group, 16, Transform([]) if start == "identity" else begun)
    rotation, whole = Transform(rotations).to(clip), whole.to(clip)
    loss_of.clip_weights(rotation)
    steps = 24  # rows are seen 6 times, or 24; 8, or 3
    losses = [float(loss_of(rotation, clip)) for _ in range(steps)]
    assert sum(losses) / steps == pytest.approx(sum(output_errors(group, whole, clip)), rel=1e-4)
    assert len(set(losses)) > 1


def test_every_row_is_drawn_before_one_comes_again() -> None:
    batches = _Batches((10, 3), 4, torch.device("cpu"))
    drawn = [batches.draw().tolist() for _ in range(5)]
    assert all(len(rows) == 4 + 3 for rows in drawn)
    assert sorted(drawn[0][4:]) == [10, 11, 12]
    for first, second in ((0, 1), (2, 3)):  # two whole batches of ten rows, then a new order
        rows = drawn[first][:4] + drawn[second][:4]
        assert len(set(rows)) == 8
        assert max(rows) < 10
    again = _Batches((10, 3), 4, torch.device("cpu"))
    assert [again.draw().tolist() for _ in range(5)] == drawn


def test_a_state_without_rows_counts_nothing() -> None:
    group = group_of((32, 0))
    learned = learn(group, Transform([torch.eye(32, dtype=torch.float64)]), TransformOptions(steps=5))
    assert bool(torch.isfinite(learned.transform.factors[0]).all())


@pytest.mark.parametrize(
    ("products", "bits", "wanted"),
    [("auto", 4, "medium"), ("auto", 8, "highest"), ("bfloat16", 8, "medium"), ("float32", 4, "highest")],
)
def test_products_are_what_the_options_say_while_it_learns(
    products: str, bits: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = _Loss.__call__
    monkeypatch.setattr(
        _Loss, "__call__", lambda self, *args: seen.append(torch.get_float32_matmul_precision()) or real(self, *args)
    )
    weights, activations = (replace(fmt, bits=bits) for fmt in FOUR)
    group = replace(group_of((16, 16)), weight_format=weights, activation_format=activations)
    before = torch.get_float32_matmul_precision()
    learn(group, Transform([torch.eye(32, dtype=torch.float64)]), TransformOptions(steps=2, products=products))  # type: ignore[arg-type]
    assert seen == [wanted] * 2
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("method", "labels"),
    [
        (("star_quant", "method.transform.steps=2"), ["block 0, qkv_input", "block 1, down_input"]),
        (
            ("star_quant", "method.transform.steps=2", "method.transform.structure=shared"),
            ["residual stream", "block 1, down_input"],
        ),
        (("flatquant", "method.epochs=2"), ["block 0", "block 1"]),
    ],
)
def test_who_waits_sees_what_is_learned_and_gets_the_same_tensors(
    method: tuple[str, ...], labels: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[dict[str, float | str]] = []
    model, (fitting, bits) = fresh("llada_gqa"), method_named(*method)
    plain = fitting.fit(model, bits, states_of(model))
    assert capsys.readouterr().err == ""
    watched = fitting.fit(model, bits, states_of(model), progress=Progress(hear=lambda f: heard.append(dict(f))))
    drawn = capsys.readouterr().err
    assert all(label in drawn for label in labels)
    losses = [figures for figures in heard if any(key.startswith("loss/") for key in figures)]
    assert losses
    assert all(figures["block"] <= 2 for figures in losses)
    for part in (ENDS, *map(block_part, range(2))):
        expected, tensors = plain.get(part), watched.get(part)
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(expected[name], tensors[name]) for name in expected)
