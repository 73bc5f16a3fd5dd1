"""Tables as text: what each format shows, and that it depends on the records alone."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from starquant.reports.assembly import Estimate, Section, assemble
from starquant.reports.definitions import TABLES
from starquant.reports.experiments import build
from starquant.reports.selection import read_runs
from starquant.reports.writing import cell_text, comma_separated, latex, markdown, write
from tests.support.tables import FACTS, answers, put, put_table

TABLE1 = TABLES["table1_main"]
MADE_UP = [
    Section(
        "a_model",
        ("testbed_facts", "50%_off", "average, to full precision", "KL", "average (paper)"),
        (
            ("full precision", 1, {"testbed_facts": Estimate(50.0, 1.234)}),
            ("R&D #1 {$x^2$} ~ \\o", 12, {"KL": Estimate(0.012345, 0.00123), "average (paper)": Estimate(44.23)}),
            ("empty", 0, {}),
        ),
    ),
    Section("other", ("testbed_facts",), (("row", 2, {"testbed_facts": Estimate(1.0)}),)),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    put_table(folder)
    put(folder, {FACTS: answers(7)}, changes={"model.name": "another"})
    return folder


@pytest.fixture(scope="module")
def sections(records: Path) -> list[Section]:
    return assemble(TABLE1, read_runs(records))


@pytest.mark.parametrize(
    ("column", "estimate", "text"),
    [
        ("gsm8k", None, ""),
        ("gsm8k", Estimate(57.294, 1.006), "57.29 (1.01)"),
        ("gsm8k (paper)", Estimate(57.29), "57.29"),
        ("KL", Estimate(0.0123456, 0.0011), "0.0123 (0.001)"),
        ("KL", Estimate(0.5), "0.5"),
        ("average, to RTN", Estimate(1.5, 0.5, 0.25, 2.75), "+1.50 [+0.25, +2.75]*"),
        ("average, to RTN", Estimate(-1.5, 0.5, -2.75, -0.25), "-1.50 [-2.75, -0.25]*"),
        ("average, to RTN", Estimate(1.5, 0.5, -0.5, 2.75), "+1.50 [-0.50, +2.75]"),
        ("average, to RTN", Estimate(1.5, 0.5, 0.0, 2.75), "+1.50 [+0.00, +2.75]"),
        ("average, to full precision (paper)", Estimate(-1.92), "-1.92"),
    ],
)
def test_cells(column: str, estimate: Estimate | None, text: str) -> None:
    assert cell_text(column, estimate) == text


def test_markdown_has_a_table_for_each_model(sections: list[Section]) -> None:
    lines = markdown(TABLE1, sections).splitlines()
    assert [s.model for s in sections] == ["another", "tiny", "LLaDA-8B", "LLaDA-1.5-8B", "Dream-7B"]
    assert lines[0] == f"# {TABLE1.title}"
    assert [line[3:] for line in lines if line.startswith("## ")] == [s.model for s in sections]
    for section in sections:
        start = lines.index(f"## {section.model}") + 2
        table = lines[start : start + 2 + len(section.rows)]
        widths = {line.count("|") for line in table}
        assert widths == {len(section.columns) + 3}
        measured = any(n for _, n, _ in section.rows)
        first = 2 + measured  # how many items, where there are any
        table = lines[start : start + first + len(section.rows)]
        assert [line.split("|")[1].strip() for line in table[2:first]] == ["items"] * measured
        assert [line.split("|")[1].strip() for line in table[first:]] == [label for label, _, _ in section.rows]
        assert [line.split("|")[2].strip() for line in table[first:]] == [str(n or "") for _, n, _ in section.rows]
    assert lines[lines.index("## tiny") + 2].startswith(
        "|  | runs | facts | profiles | average | average, to full precision |"
    )


def test_notes_say_what_is_there(sections: list[Section]) -> None:
    last = markdown(TABLE1, sections).splitlines()[-1]
    assert "95 % bootstrap intervals" in last
    assert "printed in arXiv 2606.04945 (differences" in last
    out = replace(MADE_UP[0], left_out=("humaneval",))
    said = "a_model: humaneval left out (tasks.allow_code_execution=true scores it); averages are over the other tasks"
    assert f" {said}, the paper's over all of its own." in markdown(TABLE1, [out])
    assert f" {said}." in markdown(TABLE1, [replace(out, columns=("testbed_facts",))])
    bare = markdown(TABLE1, MADE_UP[1:]).splitlines()[-1]
    assert bare == "Task scores in percent, standard errors in parentheses, KL in nats."


def test_latex_has_as_many_cells_as_columns(sections: list[Section]) -> None:
    for shown in (sections, MADE_UP):
        text = latex(TABLE1, shown)
        body = [line for line in text.splitlines() if line and not line.startswith("%")]
        tables = re.findall(r"\\begin\{tabular\}\{(lr*)\}\n\\toprule\n(.*?)\\bottomrule\n\\end\{tabular\}", text, re.S)
        assert len(tables) == len(shown) == sum(r"\begin" in line for line in body)
        for (columns, content), section in zip(tables, shown, strict=True):
            assert len(columns) == len(section.columns) + 2
            header, lines = content.split("\\midrule\n")
            for line in [header.rstrip("\n"), *lines.splitlines()]:
                assert line.endswith(r" \\")
                assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
            items = any(cell.n for _, _, cells in section.rows for cell in cells.values())
            assert len(lines.splitlines()) == len(section.rows) + items


def test_special_characters_are_escaped_in_latex() -> None:
    text = latex(TABLE1, MADE_UP)
    expected = r"R\&D \#1 \{\$x\textasciicircum 2\$\} \textasciitilde \space \textbackslash o"
    assert f"\n{expected} & 12 & " in text
    assert r"50\%\_off" in text
    shown = "\n".join(line for line in text.splitlines() if not line.startswith(("%", "\\begin", "\\end")))
    assert not re.search(r"(?<!\\)[%_#$]", shown)


def test_csv_round_trips(sections: list[Section], tmp_path: Path) -> None:
    write(TABLE1, sections, tmp_path)
    frame = pd.read_csv(tmp_path / "table1_main.csv")
    assert list(frame.columns) == ["model", "row", "runs", "column", "source", "value", "stderr", "low", "high", "n"]
    keyed = frame.set_index(["model", "row", "column", "source"])
    assert keyed.index.is_unique
    number = 0
    for section in sections:
        for label, runs, cells in section.rows:
            for column, cell in cells.items():
                source = "paper" if column.endswith(" (paper)") else "starquant"
                line = keyed.loc[(section.model, label, column.removesuffix(" (paper)"), source)]
                for name in ("value", "stderr", "low", "high", "n"):
                    expected = getattr(cell, name)
                    assert pd.isna(line[name]) if expected is None else line[name] == pytest.approx(expected, rel=1e-9)
                assert pd.isna(line["runs"]) if source == "paper" else line["runs"] == runs
                number += 1
    assert number == len(frame) > 50


def test_csv_of_awkward_names_round_trips(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(comma_separated(MADE_UP))
    frame = pd.read_csv(tmp_path / "x.csv")
    assert set(frame["row"]) == {"full precision", "R&D #1 {$x^2$} ~ \\o", "row"}
    assert frame.loc[frame["source"] == "paper", ["column", "value"]].values.tolist() == [["average", 44.23]]


def contents(paths: list[Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths}


def test_files_depend_on_the_records_alone(records: Path, tmp_path: Path) -> None:
    """Not on when they were written, nor on the names and places of their files."""
    first = contents(build("table1_main", records, tmp_path / "a"))
    assert set(first) == {"table1_main.md", "table1_main.tex", "table1_main.csv"}
    assert contents(build("table1_main", records, tmp_path / "a")) == first
    paths = sorted((records / "records").glob("*.json"))
    for index, path in enumerate(reversed(paths)):
        new = tmp_path / "moved" / str(index % 3) / f"{index:03}.json"
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, new)
        os.utime(new, (index, index))
        shutil.copytree(path.with_suffix(".items"), new.with_suffix(".items"))
    assert contents(build("table1_main", tmp_path / "moved", tmp_path / "b")) == first
    assert sorted(path.name for path in (tmp_path / "b").rglob("*") if path.is_file()) == sorted(first)
