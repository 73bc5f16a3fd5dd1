"""A table as Markdown, LaTeX and CSV. Nothing in it depends on when or where it was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from starquant.reports.assembly import PAPER_MARK, Estimate, Section
from starquant.reports.definitions import Definition
from starquant.reports.seeds import warning
from starquant.reports.text import markdown_table
from starquant.store.files import write_atomically

EMPTY = ""


def cell_text(column: str, estimate: Estimate | None) -> str:
    """Return "value (standard error)", or "difference [low, high]"."""
    if estimate is None:
        return EMPTY
    if column == "KL":
        return f"{estimate.value:.3g}" + ("" if estimate.stderr is None else f" ({estimate.stderr:.1g})")
    if estimate.low is not None and estimate.high is not None:
        sure = "" if estimate.low <= 0 <= estimate.high else "*"
        return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]{sure}"
    if column.startswith("average, to"):
        return f"{estimate.value:+.2f}"
    return f"{estimate.value:.2f}" + ("" if estimate.stderr is None else f" ({estimate.stderr:.2f})")


def cells_frame(sections: Sequence[Section]) -> pd.DataFrame:
    """Return a row a cell: model, row, runs, column, source, value, stderr, low, high, n."""
    rows = []
    for section in sections:
        for label, runs, cells in section.rows:
            for column in (column for column in section.columns if column in cells):
                measured, cell = not column.endswith(PAPER_MARK), cells[column]
                rows.append(
                    {
                        "model": section.model,
                        "row": label,
                        "runs": runs if measured else None,
                        "column": column.removesuffix(PAPER_MARK),
                        "source": "starquant" if measured else "paper",
                        **{name: getattr(cell, name) for name in ("value", "stderr", "low", "high", "n")},
                    }
                )
    names = ["model", "row", "runs", "column", "source", "value", "stderr", "low", "high", "n"]
    numbers = dict.fromkeys(("value", "stderr", "low", "high"), "float64") | {"runs": "Int64", "n": "Int64"}
    return pd.DataFrame(rows, columns=names).astype(numbers)


def text_frame(section: Section) -> pd.DataFrame:
    """Return a section as text, a line a row below the number of items behind each column."""
    header = ["", "runs", *(column.removeprefix("testbed_") for column in section.columns)]
    lines = [
        [label, str(runs) if runs else EMPTY, *(cell_text(column, cells.get(column)) for column in section.columns)]
        for label, runs, cells in section.rows
    ]
    return pd.DataFrame([*_items(section), *lines], columns=header)


def _items(section: Section) -> list[list[str]]:
    """Return a line with the number of items of each column, where rows differ the least and the most."""
    texts = []
    for column in section.columns:
        numbers = {cell.n for _, _, cells in section.rows if (cell := cells.get(column)) and cell.n is not None}
        texts.append("-".join(str(n) for n in sorted({min(numbers), max(numbers)})) if numbers else EMPTY)
    return [["items", EMPTY, *texts]] if any(texts) else []


def notes(sections: Sequence[Section]) -> list[str]:
    """Return what a reader must know of the cells."""
    sentences = ["Task scores in percent, standard errors in parentheses, KL in nats."]
    for section in sections:
        if section.limit is not None:
            sentences.append(
                f"{section.model}: the first {section.limit} items of each task only (of a group, of each member)."
            )
        if section.approximations:
            sentences.append(f"{section.model}: evaluated approximately ({', '.join(section.approximations)}).")
        if section.left_out:
            papers = any(column.endswith(PAPER_MARK) for column in section.columns)
            sentences.append(
                f"{section.model}: {', '.join(section.left_out)} left out (tasks.allow_code_execution=true scores it); "
                "averages are over the other tasks" + (", the paper's over all of its own." if papers else ".")
            )
        if (few := warning(section.seeds)) is not None:
            sentences.append(f"{section.model}: {few}")
    if any(cell.low is not None for s in sections for _, _, cells in s.rows for cell in cells.values()):
        sentences.append(
            "Differences are paired by model, seed and item; brackets are 95 % bootstrap intervals, * where they leave "
            "out zero."
        )
    if any(column.endswith(PAPER_MARK) for s in sections for column in s.columns):
        sentences.append(
            "Columns marked (paper) are figures printed in arXiv 2606.04945 (differences: of its printed averages), "
            "not ours. Empty: not run."
        )
    return sentences


def title(definition: Definition, sections: Sequence[Section]) -> str:
    """Return the title of a table; of one whose tasks were cut, with the number of items."""
    limits = sorted({section.limit for section in sections if section.limit is not None})
    return definition.title + (f": the first {', '.join(map(str, limits))} items of each task only" if limits else "")


def markdown(definition: Definition, sections: Sequence[Section]) -> str:
    """Return a heading, a GitHub table for each model, and the notes."""
    parts = [f"# {title(definition, sections)}"]
    for section in sections:
        parts += [f"## {section.model}", markdown_table(text_frame(section))]
    return "\n\n".join([*parts, " ".join(notes(sections))]) + "\n"


def latex(definition: Definition, sections: Sequence[Section]) -> str:
    """Return a tabular environment for each model (booktabs)."""
    parts = [f"% {title(definition, sections)}"]
    for section in sections:
        frame = text_frame(section)
        columns = "l" + "r" * (len(frame.columns) - 1)
        parts.append(f"% {section.model}\n{frame.to_latex(index=False, escape=True, column_format=columns).rstrip()}")
    return "\n\n".join([*parts, "% " + " ".join(notes(sections))]) + "\n"


def comma_separated(sections: Sequence[Section]) -> str:
    """Return the frame of all cells, numbers with ten digits."""
    return str(cells_frame(sections).to_csv(index=False, lineterminator="\n", float_format="%.10g"))


def write(definition: Definition, sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write NAME.md, NAME.tex and NAME.csv; returns their paths."""
    texts = {
        ".md": markdown(definition, sections),
        ".tex": latex(definition, sections),
        ".csv": comma_separated(sections),
    }
    paths = []
    for suffix, text in texts.items():
        paths.append(folder / f"{definition.name}{suffix}")
        write_atomically(paths[-1], text)
    return paths
