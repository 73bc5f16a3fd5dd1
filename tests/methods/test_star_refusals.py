"""What STaR-Quant refuses or says instead of doing something else silently."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from starquant.calibration.batches import CalibrationStates
from starquant.errors import DataError, RecordError
from starquant.methods.fitted import Fitted
from starquant.methods.star_quant import method as star_quant
from tests.support.methods import method_named
from tests.support.models import fresh
from tests.support.states import states_of

QUICK = ("bits=w4a4", "method.transform.steps=3", "method.transform.rows=16")


@pytest.mark.parametrize("inputs", ["full_precision", "quantized", "quantized_weights"])
def test_weights_are_solved_on_gated_inputs(monkeypatch: pytest.MonkeyPatch, inputs: str) -> None:
    """In states without any visible token the channels of unmasked tokens are never read."""
    seen: list[torch.Tensor] = []
    solve = star_quant.solve_sites

    def spy(visit, sites, *rest):
        from starquant.calibration.site_statistics import Collect

        found = visit.collect(Collect(moments=False, second_moment="state"), sites)[sites[0]]
        from starquant.numerics import TokenState

        seen.append(found.second_moment(TokenState.MASKED).mean.diagonal())
        return solve(visit, sites, *rest)

    monkeypatch.setattr(star_quant, "solve_sites", spy)
    method, bits = method_named("star_quant", *QUICK, "method.weights.name=gptq", "method.tac.enabled=false")
    model = fresh("llada_gqa")
    states = states_of(model)
    method.fit(model, bits, CalibrationStates(states.batches, states.mask_id, states.bins, inputs=inputs))
    assert len(seen) == 8
    gated = [diagonal[-3:] for diagonal in seen[1:]]  # but for the first attention input
    assert all(float(part.abs().max()) == 0 for part in gated)
    assert float(seen[0][-3:].min()) > 0


def test_what_was_not_fitted_is_refused() -> None:
    method, bits = method_named("star_quant", *QUICK)
    model = fresh("llada_gqa")
    with pytest.raises(RecordError, match="block_000: nothing was fitted for it; fit on this model"):
        method.apply(model, Fitted(), bits)
    assert not model.quantized


@pytest.mark.parametrize("structure", ["auto", "dense", "kronecker", "shared"])
def test_a_closed_form_that_is_too_wide_to_be_dense_falls_back_and_says_so(structure: str) -> None:
    settings = ("method.transform.dense_width=100", f"method.transform.structure={structure}")
    shares = [f"method.sgat.{state}.down_input=0.1" for state in ("masked", "unmasked")]
    method, bits = method_named("star_quant_closed_form", *QUICK, *settings, *shares)
    model = fresh("llada_gqa")  # of 96 and 160 channels
    learned = method.fit(model, bits, states_of(model))
    rows = {row["site"]: row for row in learned.report if row["block"] == 1}
    structures = {site: row["structure"] for site, row in rows.items()}
    wide = "dense" if structure == "dense" else "kronecker"
    narrow = {"auto": "dense", "shared": "fixed"}.get(structure, structure)
    own = "dense" if structure == "shared" else narrow
    assert structures == {"qkv_input": narrow, "gate_up_input": narrow, "out_input": own, "down_input": wide}
    gate, why = (16, 16), "asked"
    if structure == "shared":
        gate, why = (0, 0), "behind no norm: not part of the shared closed form"
    assert (rows["down_input"]["d_m"], rows["down_input"]["d_u"], rows["down_input"]["why"]) == (*gate, why)
    what = "closed form of the first Kronecker factor (10 x 16): wider than dense_width=100"
    fallbacks = {site: row["fallback"] for site, row in rows.items() if "fallback" in row}
    assert fallbacks == ({"down_input": what} if structure == "auto" else {})
    noted = [note for note in learned.notes if note["what"] == what]
    assert noted == ([{"what": what, "where": "down_input", "width": 160}] if structure == "auto" else [])
    assert "down_input" in {entry.site.rpartition(".")[2] for entry in method.apply(model, learned, bits) if entry.site}


def test_a_shared_closed_form_gates_the_norm_sites_only() -> None:
    method, bits = method_named("star_quant_closed_form", *QUICK, "method.transform.structure=shared")
    model = fresh("llada_gqa")
    learned = method.fit(model, bits, states_of(model))
    gates = {
        (row["block"], row["site"]): (row["d_m"], row["why"]) for row in learned.report if row["block"] is not None
    }
    assert gates[1, "qkv_input"] == (3, "asked")
    assert gates[1, "down_input"] == (0, "behind no norm: not part of the shared closed form")


@pytest.mark.parametrize("solvable", [True, False])
@pytest.mark.parametrize(
    ("structure", "where"), [("dense", r"model.transformer.blocks\.0 [a-z_]+"), ("shared", "residual stream")]
)
def test_learning_that_diverges_is_named(
    structure: str, where: str, solvable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(free_DD: torch.Tensor) -> torch.Tensor:
        if not solvable:
            raise torch.linalg.LinAlgError("singular")
        return free_DD + torch.nan

    monkeypatch.setattr("starquant.methods.star_quant.learned_transform.cayley", diverged)
    method, bits = method_named("star_quant", *QUICK, f"method.transform.structure={structure}")
    model = fresh("llada_gqa")
    with pytest.raises(DataError, match=rf"^{where}: the learned transform is not finite; lower"):
        method.fit(model, bits, states_of(model))


def test_a_transform_worse_than_its_start_is_noted() -> None:
    """At 8 bits a gate loses more than rounding does."""
    method, bits = method_named("star_quant", *QUICK[1:], "bits=w8a8")
    model = fresh("llada_gqa")
    learned = method.fit(model, bits, states_of(model))
    assert any(note["what"] == "output error above that of the start" for note in learned.notes)


def test_gates_on_a_fixed_rotation_are_noted() -> None:
    method, bits = method_named("star_quant", *QUICK, "method.transform.fit=fixed")
    model = fresh("llada_gqa")
    learned = method.fit(model, bits, replace(states_of(model)))
    assert any("gates on a fixed rotation" in note["what"] for note in learned.notes)
