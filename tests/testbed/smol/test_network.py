"""The network in training computes what the checkpoint made of its delta computes, segment by segment."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from starquant.errors import CheckpointError
from starquant.testbed.smol.training.network import LINEARS, Dimensions, Network
from starquant.testbed.smol.training.objective import draw_masks
from starquant.testbed.smol.training.packing import Rows, Segment, pack
from tests.support import smol
from tests.support.smol import HEAD_DIM, LAYERS, MASK, VOCABULARY, WIDTH

RANK = 4


@cache
def base() -> dict[str, Tensor]:
    return smol.random_base()


def network(rank: int = RANK, layers: int = LAYERS, seed: int = 0) -> Network:
    """A network whose trained parts have all moved."""
    dimensions = replace(Dimensions.of(base(), HEAD_DIM), layers=layers)
    made = Network(base(), dimensions, rank, torch.float32, seed)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in made.named_parameters():
        if not name.endswith(".A"):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data = parameter.data.bfloat16().float()  # so that what is shipped is what is computed with
    return made


def packed_rows(rows: int = 3) -> Rows:
    generator = torch.Generator().manual_seed(4)
    sizes = (12, 50, 31, 90, 17, 44, 200, 13, 256, 28)
    segments = [torch.randint(4, VOCABULARY, (size,), generator=generator).tolist() for size in sizes]
    return pack([Segment(ids, (5, 9) if len(ids) % 2 else None) for ids in segments], rows)


def test_sizes_are_read_off_the_base() -> None:
    assert Dimensions.of(base(), HEAD_DIM) == Dimensions(LAYERS, WIDTH, 4, 2, HEAD_DIM, VOCABULARY)


@pytest.mark.parametrize("layers", [1, 2])
def test_logits_are_those_of_the_merged_checkpoint_segment_by_segment(layers: int) -> None:
    trained = network(layers=layers)
    model = smol.merged_model(base(), trained.delta(), layers)
    batch = draw_masks(packed_rows(), torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = trained(batch.ids_BL, batch.position_BL, batch.segment_BL, batch.masked_BL)
        logits = trained.logits(hidden)
    noisy = torch.where(batch.masked_BL, MASK, batch.ids_BL)
    compared, largest = 0, 0.0
    for row, numbers in enumerate(batch.segment_BL.tolist()):
        for number in range(1, max(numbers) + 1):
            where = batch.segment_BL[row] == number
            with torch.no_grad():
                want = model(noisy[row, where][None]).logits[0]
            largest = max(largest, ((logits[row, where] - want).abs().max() / want.std()).item())
            compared += 1
    assert compared == 10
    assert int(batch.masked_BL.sum()) > 50
    assert largest < 1e-5


def test_segments_of_a_row_do_not_see_each_other() -> None:
    batch, trained = draw_masks(packed_rows(), torch.Generator().manual_seed(1)), network()
    of_second = batch.segment_BL == 2
    other_ids = torch.where(of_second, 4 + (batch.ids_BL - 3) % (VOCABULARY - 4), batch.ids_BL)
    with torch.no_grad():
        one, other = (
            trained(ids, batch.position_BL, batch.segment_BL, batch.masked_BL) for ids in (batch.ids_BL, other_ids)
        )
    assert torch.equal(one[~of_second], other[~of_second])
    assert not torch.equal(one[of_second], other[of_second])


def test_a_fresh_network_is_the_base() -> None:
    fresh = Network(base(), Dimensions.of(base(), HEAD_DIM), RANK, torch.float32, 0)
    delta = fresh.delta()
    assert all(not delta[f"{layer}.{name}.B"].any() for layer in range(LAYERS) for name in LINEARS)
    assert torch.equal(delta["mask"], base()["model.embed_tokens.weight"].mean(0))
    assert torch.equal(delta["nf"], base()["model.norm.weight"])
    assert torch.equal(delta["1.n2"], base()["model.layers.1.post_attention_layernorm.weight"])


def test_only_factors_norms_and_the_mask_are_trained() -> None:
    made = network()
    before = {name: buffer.clone() for name, buffer in made.named_buffers()}
    batch = draw_masks(packed_rows(), torch.Generator().manual_seed(1))
    made(batch.ids_BL, batch.position_BL, batch.segment_BL, batch.masked_BL).sum().backward()
    assert all(parameter.grad.any() for parameter in made.parameters())
    assert set(before) == {"embedding_VD"} | {f"blocks.{i}.{n}.weight_OI" for i in range(LAYERS) for n in LINEARS}
    assert len(list(made.parameters())) == LAYERS * 16 + 2


def test_a_delta_has_the_shipped_names_and_types() -> None:
    delta = network().delta()
    names = {f"{i}.{n}.{f}" for i in range(LAYERS) for n in LINEARS for f in "AB"}
    others = {f"{i}.{n}" for i in range(LAYERS) for n in ("n1", "n2")} | {"mask", "nf"}
    assert {*delta} == names | others
    assert {delta[name].dtype for name in names} == {torch.bfloat16}
    assert {delta[name].dtype for name in others} == {torch.float32}
    assert delta["0.k.A"].shape == (RANK, WIDTH)
    assert delta["0.k.B"].shape == (2 * HEAD_DIM, RANK)


def test_a_delta_is_gone_on_from() -> None:
    delta = network().delta()
    for layers in (LAYERS, 1):
        fresh = Network(base(), replace(Dimensions.of(base(), HEAD_DIM), layers=layers), RANK, torch.float32, 5)
        fresh.start_from(delta)
        got = fresh.delta()
        assert all(torch.equal(got[name], delta[name]) for name in got)
        assert len(got) == 16 * layers + 2


def test_a_delta_that_does_not_fit_is_refused() -> None:
    delta = network().delta()
    with pytest.raises(CheckpointError, match=r"--from: 0\.q\.A has shape \(4, 64\), .* \(8, 64\) \(--rank sets it\)"):
        network(rank=8).start_from(delta)
    delta.pop("nf")
    with pytest.raises(CheckpointError, match="the delta has no nf"):
        network().start_from(delta)


def test_bfloat16_is_near_float32() -> None:
    dimensions, batch = Dimensions.of(base(), HEAD_DIM), draw_masks(packed_rows(), torch.Generator().manual_seed(1))
    hidden = []
    for dtype in (torch.float32, torch.bfloat16):
        made = Network(base(), dimensions, RANK, dtype, 0)
        made.start_from(network().delta())
        with torch.no_grad():
            out = made(batch.ids_BL, batch.position_BL, batch.segment_BL, batch.masked_BL)
        assert out.dtype == dtype
        hidden.append(out.float())
    assert (hidden[0] - hidden[1]).square().mean().sqrt() < 0.03 * hidden[0].square().mean().sqrt()
