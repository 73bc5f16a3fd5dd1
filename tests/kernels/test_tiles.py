"""How a product is cut: measured settings where there are any, else a rule that always fits."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from starquant.kernels import tiles
from starquant.kernels.tiles import RowTile, Tile, key, read_tiles, row_key, row_rule, row_tile, row_tiles, rule, tile


@pytest.mark.parametrize("integer", [True, False])
def test_the_rule_covers_every_product(integer: bool) -> None:
    for rows, outputs, columns in itertools.product((1, 16, 17, 64, 100, 4096), (8, 512, 18944), (4, 2048, 9472)):
        found = rule(rows, outputs, columns, integer, 132)
        assert found.m >= min(16, rows) and {found.m, found.o, found.j} <= {16, 32, 64, 128}
        assert found.split == 1 or columns // found.split >= 2 * found.j  # no program without inputs
        assert (found.m + found.o) * found.j * found.stages * (1 if integer else 2) * 2 < 200 * 1024


@pytest.mark.parametrize(
    ("outputs", "columns"), [(4096, 2048), (4096, 6144), (37888, 1792), (3584, 9472), (4608, 1792)]
)
def test_no_step_of_a_published_shape_ends_within_a_row(outputs: int, columns: int) -> None:
    for rows in (1, 16, 17, 64, 128, 256, 1024, 4096):
        found = rule(rows, outputs, columns, True, 132)
        assert columns % (found.j * found.split) == 0


def test_a_row_is_cut_into_few_tiles_that_pad_it_little() -> None:
    assert row_tiles(64, 64) == (64, (64,)) and row_tiles(96, 128) == (128, (128,))
    assert row_tiles(128, 96) == (128, (64, 32)) and row_tiles(128, 148) == (128, (128, 32))
    for a, b in itertools.product((3, 64, 148), range(1, 400)):
        side, columns = row_tiles(a, b)
        assert side >= max(16, a) and b <= sum(columns) < b + 32 and len(columns) <= b // 128 + 2


def test_measured_rows_go_before_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, cpu = RowTile(True, (64, 32), 8, 168), torch.device("cpu")
    (tmp_path / "tiles.json").write_text(json.dumps({"cpu": {"rows": {row_key(40, 12288, 96): asdict(best)}}}))
    monkeypatch.setattr(tiles, "MEASURED", read_tiles(tmp_path / "tiles.json"))
    assert row_tile(33, 12288, 96, 128, cpu) == best
    assert row_tile(200, 12288, 96, 128, cpu) == row_rule(200, 12288, 96, 128, 1)


def test_few_tiles_are_split_among_processors() -> None:
    assert rule(16, 4096, 2048, True, 132).split > 1
    assert rule(2048, 12288, 2048, True, 132).split == 1


def test_what_was_measured_goes_before_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = Tile(32, 64, 64, 2, 4, 3)
    (tmp_path / "tiles.json").write_text(json.dumps({"cpu": {"products": {key(40, 4096, 2048, True): asdict(best)}}}))
    assert read_tiles(tmp_path / "nothing.json") == {}
    monkeypatch.setattr(tiles, "MEASURED", read_tiles(tmp_path / "tiles.json"))
    cpu = torch.device("cpu")
    assert tile(33, 4096, 2048, True, cpu) == tile(64, 4096, 2048, True, cpu) == best
    assert tile(65, 4096, 2048, True, cpu) == rule(65, 4096, 2048, True, 1)
    assert tile(40, 4096, 2048, False, cpu) == rule(40, 4096, 2048, False, 1)


def test_tokens_count_by_powers_of_two() -> None:
    assert key(1, 8, 4, True) == key(16, 8, 4, True) == "int8 16 x 8 x 4"
    assert key(17, 8, 4, False) == "16 bit 32 x 8 x 4"
    assert key(5000, 8, 4, True) == key(2048, 8, 4, True)


def test_a_split_that_was_measured_is_not_that_of_ever_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part holds int32 sums of all rows."""
    split, whole = Tile(64, 64, 128, 4, 4, 3), Tile(128, 64, 64, 1, 4, 3)
    products = {"int8 2048 x 512 x 2048": split, "int8 2048 x 256 x 2048": whole}
    monkeypatch.setattr(tiles, "MEASURED", {"cpu": tiles.Measured(products, {})})
    cpu = torch.device("cpu")
    assert tile(2048, 512, 2048, True, cpu) == split
    assert tile(2049, 512, 2048, True, cpu) == rule(2049, 512, 2048, True, 1)
    assert tile(65536, 256, 2048, True, cpu) == whole
