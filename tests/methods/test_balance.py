"""The closed-form invertible map in front of P: least, exact, told in the checkpoint for what it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starquant.errors import CheckpointError, ConfigError
from starquant.methods.star_quant.balance import DAMPING, balanced, balanced_factors, sampling_error, shrunk
from starquant.models.roles import Site
from starquant.quantized import InvertibleKronecker, InvertibleTransform
from tests.support.methods import by_hand, method_named
from tests.support.models import ARCHITECTURES, fresh, logits
from tests.support.states import states_of

QUICK = ("bits=w4a4", "method.transform.steps=2", "method.transform.rows=16", "method.tac.enabled=false")


def second_moment(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows_ND = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    rows_ND = rows_ND * torch.logspace(0, 1, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
    return rows_ND.T @ rows_ND / len(rows_ND)


def damped(moment_DD: Tensor) -> Tensor:
    return moment_DD / moment_DD.diagonal().mean() + DAMPING * torch.eye(len(moment_DD))


def cost(a_DD: Tensor, second_DD: Tensor, weight_DD: Tensor) -> float:
    inverse_DD = torch.linalg.inv(a_DD)
    return float((a_DD.T @ second_DD @ a_DD).trace() * (inverse_DD @ weight_DD @ inverse_DD.T).trace())


def test_the_map_is_the_least_of_the_product() -> None:
    """X = A A^T solves X S X = H up to a factor (the geometric mean), and everything near it costs more."""
    second_DD, weight_DD = second_moment(12, 0), second_moment(12, 1)
    a_DD = balanced(second_DD, weight_DD)
    assert torch.allclose(a_DD, a_DD.T) and float(torch.linalg.det(a_DD)) == pytest.approx(1.0)
    second_DD, weight_DD = damped(second_DD), damped(weight_DD)
    solved_DD = a_DD @ a_DD @ second_DD @ a_DD @ a_DD
    assert torch.allclose(solved_DD / solved_DD.trace(), weight_DD / weight_DD.trace(), atol=1e-10)
    least, generator = cost(a_DD, second_DD, weight_DD), torch.Generator().manual_seed(2)
    for _ in range(100):
        other_DD = a_DD + 0.05 * torch.randn(12, 12, generator=generator, dtype=torch.float64)
        assert cost(other_DD, second_DD, weight_DD) > least
    rotation_DD = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    assert cost(a_DD @ rotation_DD, second_DD, weight_DD) == pytest.approx(least)


def test_factors_are_those_of_a_product() -> None:
    """Where S and H are Kronecker products, so is the least map, and the alternation meets it."""
    left, right = [second_moment(3, seed) for seed in (0, 1)], [second_moment(5, seed) for seed in (2, 3)]
    rows_ND, weight_OD = (torch.linalg.cholesky(torch.kron(a, b)).T for a, b in zip(left, right, strict=True))
    generator = torch.Generator().manual_seed(4)
    mixed_ND = torch.randn(40_000, 15, generator=generator, dtype=torch.float64) @ rows_ND
    factors = balanced_factors(mixed_ND.unflatten(1, (3, 5)), weight_OD.unflatten(1, (3, 5)))
    for factor, (second, weight) in zip(factors, (left, right), strict=True):
        assert torch.allclose(factor, balanced(second, weight), atol=0.02)


def test_a_moment_of_few_rows_is_shrunk_to_what_it_is_of() -> None:
    """By the estimated error alone; the mixture is nearer the truth than the sample, in the mean over samples."""
    truth_DD, generator = second_moment(20, 0), torch.Generator().manual_seed(1)
    root_DD = torch.linalg.cholesky(truth_DD)
    before, after, errors = 0.0, 0.0, []
    for _ in range(50):
        rows_ND = torch.randn(30, 20, generator=generator, dtype=torch.float64) @ root_DD.T
        sample_DD = rows_ND.T @ rows_ND / 30
        errors.append(sampling_error(rows_ND[..., None], sample_DD))
        before += float((sample_DD - truth_DD).square().sum()) / 50
        after += float((shrunk(sample_DD, errors[-1]) - truth_DD).square().sum()) / 50
    assert sum(errors) / 50 == pytest.approx(before, rel=0.2)
    assert after < 0.8 * before
    assert torch.equal(shrunk(truth_DD, 0.0), truth_DD)
    isotropic_DD = shrunk(truth_DD, float("inf"))
    assert torch.allclose(isotropic_DD, truth_DD.diagonal().mean() * torch.eye(20, dtype=torch.float64))


@pytest.mark.parametrize("structure", ["dense", "kronecker"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_but_rounding_changes(architecture: str, structure: str) -> None:
    settings = (
        "method.transform.structure=" + structure,
        "method.weights.name=rtn",
        "method.tac.enabled=false",
        "method.fisher.hessian=false",
    )
    method, bits = method_named("star_quant_plus", *QUICK, *settings)
    model = fresh(architecture)
    states = states_of(model)
    learned, before = method.fit(model, bits, states), logits(model, states.batches[0].ids_BL)
    by_hand(method, model, learned)
    placed = model.block_sites(model.trunk().blocks[1]).inputs
    kind = {"dense": InvertibleTransform, "kronecker": InvertibleKronecker}[structure]
    for site in (Site.QKV, Site.OUT, Site.GATE_UP, Site.DOWN):
        transform = placed[site].transform
        assert isinstance(transform, kind)
        transform.validate(site.value)
    matrix_DD = placed[Site.DOWN].transform
    factor = matrix_DD.matrix_DD if structure == "dense" else matrix_DD.a_MM  # type: ignore[union-attr]
    assert float((factor @ factor.T - torch.eye(len(factor))).abs().max()) > 0.01, "an orthogonal P would do"
    after = logits(model, states.batches[0].ids_BL)
    assert float((after - before).norm() / before.norm()) < 1e-4


@pytest.mark.parametrize("setting", ["fit=closed_form", "start=closed_form", "structure=shared", "fit=fixed"])
def test_only_what_learns_a_matrix_of_its_own_takes_it(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"^method\.transform\.balance: got true, but"):
        method_named("star_quant_plus", *QUICK, f"method.transform.{setting}")


def test_a_singular_matrix_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^site\.matrix_DD: got a matrix of condition number"):
        InvertibleTransform(torch.ones(4, 4)).validate("site")
