"""How a product is cut: measured settings where there are any, else a rule that always fits."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from starquant.kernels import tiles
from starquant.kernels.tiles import Tile, key, read_tiles, rule, tile


@pytest.mark.parametrize("integer", [True, False])
def test_the_rule_covers_every_product(integer: bool) -> None:
    for rows, outputs, columns in itertools.product((1, 16, 17, 64, 100, 4096), (8, 512, 18944), (4, 2048, 9472)):
        found = rule(rows, outputs, columns, integer, 132)
        assert found.m >= min(16, rows) and {found.m, found.o, found.j} <= {16, 32, 64, 128}
        assert found.split == 1 or columns // found.split >= 2 * found.j  # no program without inputs
        assert (found.m + found.o) * found.j * found.stages * (1 if integer else 2) * 2 < 200 * 1024


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
