"""Table 4 from measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from starquant.reports.efficiency import main, read, table


def row(precision: str, ms: float, size: int, **more: object) -> dict[str, object]:
    same = {"model": "llada", "shape": "8b", "kind": "forward", "batch": 1, "tokens": 64, "tokens_per_s": 64000 / ms}
    same |= {"ends": 8, "launch": "graph"}
    return same | {"precision": precision, "ms": ms, "resident_bytes": size, "of_roofline": 0.5} | more


def test_precisions_are_compared_with_bf16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("bf16", 4.0, 16 * 10**9), row("w4a4", 2.0, 5 * 10**9), row("w4a4", 1.0, 9, shape="small")]
    rows += [row("w4a4", 2.5, 5 * 10**9, launch="eager"), row("bf16", 4.5, 16 * 10**9, launch="eager")]
    rows += [row("w4a4-no-tac", 1.98, 5 * 10**9)]
    rows += [row("w4a4-plain", 1.9, 5 * 10**9, parts_ms={"gemm": 1.5, "quantization": 0.25})]
    (tmp_path / "h200.json").write_text(json.dumps({"device": "H200", "rows": rows}))
    found = table(read(tmp_path))
    assert found[["precision", "speed", "memory"]].values.tolist() == [
        ["bf16", "1.00x", "1.00x"],
        ["w4a4", "2.00x", "3.20x"],
        ["w4a4-no-tac", "2.02x", "3.20x"],
        ["w4a4-plain", "2.11x", "3.20x"],
    ]
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (
        "| H200 | 8 | forward | 1 | 64 | w4a4 | graph | 2.00 | 32000 | 2.00x | 5.00 | 3.20x | 5.0% |  | 1.0% | 0.50 |"
        in printed
    )
    assert "| H200 | 8 | forward | 1 | 64 | w4a4-plain | graph | 1.5 | 0.25 |" in printed
    assert "| LLaDA-8B | NVIDIA A40 | 34.59 |" in printed and "paper (arXiv 2606.04945)" in printed


def test_without_a_measurement_only_the_papers_figures_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert (
        "holds no measurement of 8B shapes" in printed.err and "Measured" not in printed.out and "1.65" in printed.out
    )
    (tmp_path / "bad.json").write_text("{")
    assert main([str(tmp_path)]) == 2
    assert "bad.json: not readable as a measurement" in capsys.readouterr().err


def test_what_was_entered_by_hand_says_so_and_launches_are_not_mixed(tmp_path: Path) -> None:
    rows = [row("w4a4", 2.0, 5 * 10**9, launch="compiled"), row("w4a4-plain", 3.0, 5 * 10**9)]
    rows += [row("bf16", 4.0, None)]  # type: ignore[arg-type]
    (tmp_path / "a.json").write_text(json.dumps({"device": "H100", "code": "afb57db", "entered": "", "rows": rows}))
    found = table(read(tmp_path))
    assert set(found.device) == {"H100 (code afb57db, by hand)"}
    assert found[["precision", "transforms", "peak GB", "memory"]].values.tolist() == [
        ["w4a4", "", "5.00", ""],
        ["w4a4-plain", "", "5.00", ""],
        ["bf16", "", "", ""],
    ]
