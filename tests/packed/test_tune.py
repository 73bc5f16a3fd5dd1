"""Launch settings of a GPU: what is measured for a model, and where it is kept. Nothing is measured here."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from starquant.errors import ConfigError
from starquant.kernels import tiles
from starquant.kernels.tiles import RowTile, Tile, read_tiles
from starquant.kernels.tuning import measuring
from starquant.kernels.tuning.shapes import PUBLISHED, PUBLISHED_HEADS, Product, Transform
from starquant.numerics import kronecker_sizes
from starquant.packed.description import use_integers
from starquant.packed.tune import Kept, cases_of, heads_of, main, shapes_of
from starquant.packed.tuned import use_tuned
from tests.support.paths import REPOSITORY

TILE, ROW = Tile(64, 64, 128, 1, 4, 3), RowTile(True, (64, 32), 8, 168)


@pytest.fixture(autouse=True)
def _known_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MEASURED", dict(tiles.MEASURED))


def test_a_models_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v are one product, gate and up another; a P of one factor has nothing to choose."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from packed_models import build

    llada, dream = (build(family, "small", "w4a4", "cpu") for family in ("llada", "dream"))
    for model in (llada, dream):
        use_integers(model, join="always")
    keys = 128  # of 2 heads of 64
    for model, joined in ((llada, 3 * 256), (dream, 256 + 2 * keys)):
        assert set(shapes_of(model)) == {
            Product(joined, 256, 4),
            Product(256, 256, 4),
            Product(2 * 768, 256, 4),
            Product(256, 768, 4),
            Transform(256, 16, False),
            Transform(768, 24, True),
        }
    quarot = build("llada", "small", "w4a4-quarot", "cpu")
    use_integers(quarot, join="always")
    assert [shape for shape in shapes_of(quarot) if isinstance(shape, Transform)] == [Transform(768, 24, True)]
    values = build("llada", "small", "w4a16", "cpu")
    assert set(shapes_of(values)) == {Product(*size, 4, False) for size in ((256, 256), (768, 256), (256, 768))}
    plain = build("llada", "small", "bf16", "cpu")
    assert shapes_of(plain) == () and heads_of(plain) == ()
    head = llada.trunk().head
    assert heads_of(llada) == (Product(head.out_features, 256, 8, False),)


def test_what_is_measured_without_a_checkpoint_are_the_published_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from prediction import SHAPES

    products = {Product(*sizes, 4) for shape in SHAPES.values() for sizes in shape.linears}
    widths = [
        (width, swiglu) for shape in SHAPES.values() for width, swiglu in ((shape.hidden, False), (shape.inner, True))
    ]
    transforms = {Transform(width, kronecker_sizes(width)[0], swiglu) for width, swiglu in widths}
    assert set(PUBLISHED) == products | transforms
    assert {*PUBLISHED_HEADS} == {Product(shape.words, shape.hidden, 8, False) for shape in SHAPES.values()}
    cases = cases_of(PUBLISHED, PUBLISHED_HEADS, (128, 16))
    assert len(cases) == 2 * len(PUBLISHED) + 2 and {rows for rows, shape in cases if shape in PUBLISHED_HEADS} == {16}


@pytest.mark.parametrize("rows", [16, 128, 1024])
def test_candidates_fit(rows: int) -> None:
    for shape in PUBLISHED:
        if isinstance(shape, Product):
            found = [*measuring.product_candidates(rows, shape)]
            assert all(shape.columns % (tile.j * tile.split) == 0 for tile in found)
        else:
            found = [*measuring.row_candidates(shape)]
            sides = {True: (shape.b, shape.a), False: (shape.a, shape.b)}
            assert all(sum(one.columns) >= sides[one.turned][1] for one in found)
            assert all(32 * one.warps * one.registers <= measuring.REGISTERS for one in found)
        assert 2 <= len(found) == len(set(found)) < 100


def test_what_was_measured_is_kept_and_goes_before_what_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARQUANT_CACHE", str(tmp_path))
    file, transform = tmp_path / "tiles.json", Transform(12288, 96, True)
    kept = Kept(file, "cpu")
    kept.take(100, Product(4096, 4096, 4), TILE)
    kept.take(100, transform, ROW)
    assert read_tiles(file) == {"cpu": tiles.Measured({"int8 128 x 4096 x 2048": TILE}, {"128 x 96 x 128": ROW})}
    again = Kept(file, "cpu")
    assert again.holds(128, Product(4096, 4096, 4)) and again.holds(65, transform)
    assert not again.holds(129, transform) and not Kept(file, "another").holds(100, transform)
    use_tuned()
    cpu = torch.device("cpu")
    assert tiles.tile(100, 4096, 2048, True, cpu) == TILE and tiles.row_tile(128, 12288, 96, 128, cpu) == ROW
    assert tiles.row_tile(128, 12288, 96, None, cpu) == tiles.row_rule(128, 12288, 96, None, 1)  # nothing to turn
    assert "NVIDIA H100 80GB HBM3" in tiles.MEASURED  # what is shipped stays


def test_settings_under_which_a_gpu_gave_up_are_left_out_from_then_on(tmp_path: Path) -> None:
    file, product = tmp_path / "tiles.json", Product(4096, 4096, 4)
    kept = Kept(file, "gpu")
    assert kept.may_try(128, product, TILE)
    kept.gave_up(128, product, TILE)
    again = Kept(file, "gpu")
    assert not again.may_try(100, product, TILE)
    assert Kept(file, "another").may_try(128, product, TILE)
    assert again.may_try(16, product, TILE) and again.may_try(128, product, replace(TILE, warps=8))
    again.failed_path.write_text("{}")
    with pytest.raises(ConfigError, match=r"tiles\.failed\.json: holds no list of launch settings; remove it$"):
        Kept(file, "gpu")


@pytest.mark.parametrize("content", ["", "[]", '{"gpu": 1}', '{"gpu": {"products": {"a": {"m": 1}}}}'])
def test_a_file_of_something_else_is_named(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STARQUANT_CACHE", str(tmp_path))
    (tmp_path / "tiles.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tiles\.json: holds no launch settings .*; remove it$"):
        Kept(tmp_path / "tiles.json", "cpu")
    with caplog.at_level(logging.WARNING):
        use_tuned()
    assert "launch settings are not read" in caplog.text
    assert (tmp_path / "tiles.json").read_text() == content


def test_what_is_shipped_is_whole() -> None:
    shipped = json.loads((REPOSITORY / "starquant" / "kernels" / "tiles.json").read_text())
    assert sum(len(kinds["products"]) for kinds in shipped.values()) >= 12
    for rows, product in ((rows, p) for rows in (16, 128, 1024) for p in PUBLISHED[:4] if isinstance(p, Product)):
        assert product.key(rows) in shipped["NVIDIA H100 80GB HBM3"]["products"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (([], "there is no GPU here"), (["--rows", "0"], "--rows: got 0, allowed: 1 or more")):
        assert main(words) == 2
        assert said in capsys.readouterr().err
