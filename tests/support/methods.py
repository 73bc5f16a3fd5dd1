"""Methods with quick settings, and what they have fitted."""

from __future__ import annotations

import copy
import functools

import torch

from starquant.config.bits import BitsSpec
from starquant.config.methods import METHODS
from starquant.methods.base import Method
from starquant.methods.blockwise import BlockwiseMethod
from starquant.methods.fitted import ENDS, Fitted, block_part
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Site
from tests.support.models import fresh, hooks_of, logits, trajectory
from tests.support.specs import compose, spec
from tests.support.states import states_of

# Few steps of learning keep the same contract; blocks that divide every width here.
QUICK = ("method.transform.steps=4", "method.tac.block_size=16", "method.epochs=1")
FOUR = ("bits=w4a4", "bits.attention.v=4", "bits.attention.k=4")


def method_named(name: str, *overrides: str) -> tuple[Method, BitsSpec]:
    """The method of a preset in conf/method, with less to learn, and the bits on the grid that it is run on."""
    options = compose(f"method={name}")["method"]
    chosen = {override.partition("=")[0] for override in overrides}
    quick = [o for o in QUICK if o.split(".")[1] in options and o.partition("=")[0] not in chosen]
    run = spec(f"method={name}", *quick, *overrides)
    bits = run.bits.on_grid_of(run.method.authors)
    return METHODS.build(run.method.at_bits(bits)), bits


def fitted_once(name: str, architecture: str) -> Fitted:
    """What is fitted for W4A4; tests share it, as nothing that is done with it changes it."""
    return first_fit(name, architecture)[0]


@functools.cache
def first_fit(name: str, architecture: str) -> tuple[Fitted, list[str]]:
    """What is fitted for W4A4, and what of the model is not as it was before."""
    method, bits = method_named(name, *FOUR)
    model = fresh(architecture)
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    learned = method.fit(model, bits, states_of(model))
    changed = [key for key, value in model.state_dict().items() if not torch.equal(before.pop(key), value)]
    changed += [*before, *(["modules"] if dict(model.named_modules()) != modules else []), *map(str, hooks_of(model))]
    return learned, changed


def by_hand(method: BlockwiseMethod, model: MaskedDiffusionModel, learned: Fitted, times: int = 1) -> None:
    """Put everything but quantizers in place: gates act, nothing is rounded."""
    bits = spec("bits=w4a4").bits
    method.rewrite_ends(model, learned.get(ENDS))
    for index, block in enumerate(model.trunk().blocks):
        sites, tensors = model.block_sites(block), learned.get(block_part(index))
        method.prepare(sites, learned.get(ENDS))
        method.rewrite(sites, tensors)
        for _ in range(times):
            method.compensate(sites, tensors, bits)


FIRST_BLOCK = 0
DEAD = 3


def silenced(architecture: str) -> MaskedDiffusionModel:
    """A model in which one channel of one norm is always zero."""
    model = fresh(architecture)
    with torch.no_grad():
        model.block_sites(model.trunk().blocks[FIRST_BLOCK]).norms[Site.QKV].weight[DEAD] = 0.0
    return model


def dead_channel_fit(name: str, *overrides: str) -> tuple[MaskedDiffusionModel, Fitted]:
    """Fit on the silenced model and hold what every scaling method owes it; returns the quantized model."""
    method, bits = method_named(name, "bits=w4a4", *overrides)
    model = silenced("llada_mha")
    learned = method.fit(model, bits, states_of(model))
    noted = [note for note in learned.notes if note["what"] == "dead channels left unscaled"]
    assert noted == [
        {"what": noted[0]["what"], "where": f"{model.block_name(FIRST_BLOCK)} qkv_input", "count": 1},
    ]
    scale_D = learned.get(block_part(FIRST_BLOCK))["qkv_input.scale"]
    assert scale_D[DEAD] == 1.0
    assert bool(torch.isfinite(scale_D).all())
    assert bool((scale_D > 0).all())
    exact = silenced("llada_mha")
    method.apply(exact, learned, spec("bits=w16a16").bits)
    ids = trajectory(silenced("llada_mha"))
    torch.testing.assert_close(logits(exact, ids), logits(silenced("llada_mha"), ids), rtol=1e-3, atol=1e-4)
    method.apply(model, learned, bits)
    assert bool(torch.isfinite(logits(model, ids)).all())
    return model, learned
