"""Packed checkpoints whose numbers are of no model: scales, codes, rotations, corrections, clip ratios."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from starquant.errors import CheckpointError
from starquant.models import load_model
from starquant.packed.export import export
from starquant.quantized import InvertibleKronecker, KeyTransform, KroneckerTransform, QuantizedAttentionCore
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.methods import FOUR, fitted_once, method_named
from tests.support.models import fresh
from tests.support.records import make_record
from tests.support.specs import spec


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with learned rotations, corrections and clip ratios."""
    method, bits = method_named("star_quant", *FOUR)
    model, folder = fresh("llada_gqa"), tmp_path_factory.mktemp("packed") / "model"
    method.apply(model, fitted_once("star_quant", "llada_gqa"), bits, packed=True)
    export(model, make_record(spec()), weights_folder(0), folder)
    return folder


def test_each_factor_of_a_kronecker_product_must_be_orthogonal() -> None:
    good = torch.linalg.qr(torch.randn(6, 6))[0]
    KroneckerTransform(good, torch.eye(4)).validate("site")
    for factors, named in (((0 * good, torch.eye(4)), "a_MM"), ((good, 2 * torch.eye(4)), "b_NN")):
        with pytest.raises(CheckpointError, match=f"site.{named}: got a matrix that is not orthogonal"):
            KroneckerTransform(*factors).validate("site")


def test_invertible_factors_must_be_finite_and_far_from_singular() -> None:
    good = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
    InvertibleKronecker(good, None).validate("site")
    InvertibleKronecker(good, good).validate("site")
    for bad, message in ((torch.ones(2, 2), "of condition number"), (good / 0, "values that are not finite")):
        for factors, named in (((bad, None), "a_MM"), ((good, bad), "b_NN")):
            with pytest.raises(CheckpointError, match=f"site.{named}: got .*{message}"):
                InvertibleKronecker(*factors).validate("site")
    KeyTransform.of(good).validate("core")
    with pytest.raises(CheckpointError, match=r"core.dual_EE: got a matrix that does not undo matrix_EE"):
        KeyTransform(good, good).validate("core")
    with pytest.raises(CheckpointError, match=r"core.matrix_EE: got a matrix of condition number"):
        KeyTransform(torch.ones(2, 2), good).validate("core")
    core = QuantizedAttentionCore(dict.fromkeys("qkpv", 4), clip_OE=torch.tensor([[0.9, 0.9], [1.1, 0.9], [1.0, 1.0]]))
    with pytest.raises(CheckpointError, match=r"core.clip_OE: clip ratios must be above 0, at most 1"):
        core.validate("core")


def half(tensor: Tensor) -> None:
    tensor.mul_(0.5)


DAMAGE: dict[str, tuple[str, Callable[[Tensor], object], str]] = {
    "scales without measure": (
        "q_proj.scale",
        lambda t: t.fill_(3e38),
        r"scale: its weights reach .*; allowed: at most",
    ),
    "one scale": ("q_proj.scale", lambda t: t[0].fill_(1e30), r"scale: its weights reach 1.5e\+31"),
    "a scale of zero": ("q_proj.scale", lambda t: t[-1].zero_(), "scale: got values that are not positive"),
    "codes of a file with a hole": ("up_proj.codes", lambda t: t.zero_(), "codes: got one code only, 0"),
    "a rotation of zeros": ("matrix_DD", lambda t: t.zero_(), "matrix_DD: got a matrix that is not orthogonal"),
    "a rotation that shrinks": ("matrix_DD", half, "matrix_DD: got a matrix that is not orthogonal"),
    "a rotation with one wrong number": (
        "matrix_DD",
        lambda t: t[0, 0].add_(0.1),
        "matrix_DD: got a matrix that is not orthogonal",
    ),
    "a correction of zeros": ("matrix_CNGG", lambda t: t.zero_(), "matrix_CNGG: got a map of zeros"),
    "a shift without measure": ("shift_CNG", lambda t: t.fill_(1e20), r"shift_CNG holds values of up to 1e\+20"),
    "a clip ratio above one": (
        "state_clip",
        lambda t: t.fill_(2.0),
        "state_clip: got 2, 2, allowed: above 0, at most 1",
    ),
    "a norm that is no number": ("attn_norm.weight", lambda t: t.fill_(torch.nan), "attn_norm.weight holds values"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, packed: Path, tmp_path: Path) -> None:
    name, change, message = DAMAGE[damage]
    tensors = load_file(packed / "model.safetensors")
    change(next(tensor for key, tensor in sorted(tensors.items()) if key.endswith(name)))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
