"""Passes that end early see what whole ones see."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from starquant.calibration import walk
from starquant.calibration.partial_pass import run_as_far_as
from starquant.models.base import MaskedDiffusionModel
from tests.support.methods import method_named
from tests.support.models import fresh_tiny
from tests.support.states import tiny_states


def test_a_pass_ends_behind_the_hooks_of_its_last_module_and_leaves_none() -> None:
    """Modules behind it are not run; what they would raise is not heard, what comes before is."""
    seen: list[str] = []
    block = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    for index, module in enumerate(block):
        module.register_forward_hook(lambda *_, index=index: seen.append(f"layer {index}"))
    run_as_far_as(block[1], block, torch.ones(1, 2))
    assert seen == ["layer 0", "layer 1"]
    block(torch.ones(1, 2))
    assert seen[2:] == ["layer 0", "layer 1", "layer 2"]
    with pytest.raises(RuntimeError, match="shapes"):
        run_as_far_as(block[1], block, torch.ones(1, 3))


def test_weights_solved_behind_partial_passes_are_those_behind_whole_ones(
    tiny: MaskedDiffusionModel, tiny_tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Site after site on quantized inputs, with inputs compared: bit for bit, in fewer linears."""
    states = dataclasses.replace(tiny_states(tiny, tiny_tokenizer, "train", 8), inputs="quantized")
    method, bits = method_named("quarot", "calibration.inputs=quantized", "method.weights.propagation=1")
    ran: list[int] = []

    def whole(last: nn.Module, block: nn.Module, *arguments: Any) -> None:
        block(*arguments)

    def solved() -> dict[str, torch.Tensor]:
        model, count = fresh_tiny(), 0

        def counting(module: nn.Module, *_: Any) -> None:
            nonlocal count
            count += isinstance(module, nn.Linear)

        handle = nn.modules.module.register_module_forward_hook(counting)
        try:
            fitted = method.fit(model, bits, states)
        finally:
            handle.remove()
        ran.append(count)
        return {f"{part}/{name}": x for part in fitted.parts() for name, x in fitted.get(part).items()}

    partial = solved()
    monkeypatch.setattr(walk, "run_as_far_as", whole)
    assert all(partial[name].equal(x) for name, x in solved().items())
    assert ran[0] < 0.75 * ran[1]
