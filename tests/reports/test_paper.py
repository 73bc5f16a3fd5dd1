"""The paper's figures stand in columns of their own, beside the rows they belong to, and nowhere else."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from starquant.reports.assembly import AVERAGE, PAPER_MARK, WHOLE, Section, assemble, to
from starquant.reports.definitions import NINE, TABLES
from starquant.reports.selection import read_runs
from tests.support.paths import REPOSITORY
from tests.support.tables import FACTS, answers, put

FILES = {
    "table1_main": "table1_w4a4",
    "table2_ablation": "table2_ablation",
    "table3_tac_block_size": "table3_tac_block_size",
    "table5_w8a8": "table5_w8a8",
}
MODELS = {"table1_main": 3, "table2_ablation": 1, "table3_tac_block_size": 1, "table5_w8a8": 3}
#: The paper's row by ours; block sizes are named by their numbers.
LABELS = {"FP16": "full precision", "without TAC": "without TAC", "without SGAT": "without SGAT"}
LABELS |= {name: name for name in ("RTN", "AWQ", "DLLMQuant+", "QuaRot", "DLLMQuant++", "STaR-Quant")}


def printed(name: str) -> dict[tuple[str, str, str], float]:
    """(model, row, column) to figure, of a file of results/paper."""
    with open(REPOSITORY / "results" / "paper" / f"{FILES[name]}.csv", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    found = {}
    whole = {line["model"]: float(line["avg"]) for line in lines if "FP16" in line.values()}
    for line in lines:
        label = LABELS.get(line.get("method") or line.get("variant") or "") or f"g = {line['block_size']}"
        for column, text in line.items():
            task = {"ceval": "ceval-valid", "avg": AVERAGE}.get(column, column)
            if task in (*NINE, AVERAGE) and text:
                found[line["model"], label, task] = float(text)
        if line["model"] in whole and label != "full precision":
            found[line["model"], label, to(WHOLE)] = float(line["avg"]) - whole[line["model"]]
        if "drop_from_fp16" in line and label != "full precision":
            assert found[line["model"], label, to(WHOLE)] == pytest.approx(-float(line["drop_from_fp16"]))
    return found


def shown(sections: list[Section], papers: bool) -> dict[tuple[str, str, str], float]:
    return {
        (section.model, label, column.removesuffix(PAPER_MARK)): cell.value
        for section in sections
        for label, _, cells in section.rows
        for column, cell in cells.items()
        if column.endswith(PAPER_MARK) == papers
    }


@pytest.mark.parametrize("name", FILES)
def test_the_papers_figures_are_those_of_its_file(name: str, tmp_path: Path) -> None:
    bits = "w8a8" if name == "table5_w8a8" else "w4a4"
    for task, model in ((FACTS, "tiny"), ("gsm8k", "dream")):
        filter_name = "flexible-extract" if task == "gsm8k" else "none"
        metric = "exact_match" if task == "gsm8k" else "acc"
        put(tmp_path, {task: answers(1)}, "star_quant", bits, model, metric=metric, filter_name=filter_name)
    sections = assemble(TABLES[name], read_runs(tmp_path))
    assert shown(sections, papers=True) == pytest.approx(printed(name))
    ours = {(section, label) for section, label, _ in shown(sections, papers=False)}
    star = "g = 16" if name == "table3_tac_block_size" else "STaR-Quant"
    assert ours == {("tiny", star), ("Dream-7B", star)}
    for section in sections:
        seen = {column for _, _, cells in section.rows for column in cells}
        assert seen <= set(section.columns)
        assert len(section.columns) == len(set(section.columns))


@pytest.mark.parametrize("name", FILES)
def test_models_that_nobody_ran_have_their_section_and_empty_cells(name: str) -> None:
    sections = assemble(TABLES[name], [])
    assert [section.model for section in sections] == ["LLaDA-8B", "LLaDA-1.5-8B", "Dream-7B"][: MODELS[name]]
    assert shown(sections, papers=False) == {}
    assert all(n == 0 for section in sections for _, n, _ in section.rows)
    for section in sections:
        own = [column for column in section.columns if not column.endswith(PAPER_MARK)]
        assert own == ([*NINE, AVERAGE] if name == "table1_main" else [AVERAGE])
        assert AVERAGE + PAPER_MARK in section.columns


def test_the_embedded_model_has_no_columns_of_the_paper(tmp_path: Path) -> None:
    put(tmp_path, {"gsm8k": answers(1)}, "star_quant", metric="exact_match", filter_name="flexible-extract")
    sections = assemble(TABLES["table1_main"], read_runs(tmp_path))
    assert [section.model for section in sections] == ["tiny", "LLaDA-8B", "LLaDA-1.5-8B", "Dream-7B"]
    assert sections[0].columns == ("gsm8k", AVERAGE)


def test_a_column_of_the_paper_stands_beside_ours(tmp_path: Path) -> None:
    told = {"metric": "exact_match", "filter_name": "flexible-extract"}
    put(tmp_path, {"gsm8k": answers(1)}, "star_quant", model="llada", **told)
    put(tmp_path, {"gsm8k": answers(2)}, "star_quant_plus", model="llada", **told)
    section = assemble(TABLES["table1_main"], read_runs(tmp_path))[0]
    assert section.columns[:4] == ("gsm8k", f"gsm8k{PAPER_MARK}", AVERAGE, AVERAGE + PAPER_MARK)
    rows = {label: (n, cells) for label, n, cells in section.rows}
    assert rows["QuaRot"][0] == 0
    assert set(rows["QuaRot"][1]) >= {f"gsm8k{PAPER_MARK}"}
    assert rows["star_quant_plus (ours)"][0] == 1
    assert not any(column.endswith(PAPER_MARK) for column in rows["star_quant_plus (ours)"][1])
    assert rows["SmoothQuant"] == (0, {})
