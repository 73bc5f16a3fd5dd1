"""A table as Markdown, LaTeX and CSV. Nothing in it depends on when or where it was written."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from starquant.reports.assembly import PAPER_MARK, Estimate, Section
from starquant.reports.definitions import Definition
from starquant.reports.seeds import warning
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


def grid(section: Section) -> list[list[str]]:
    """Return a section as text, the header first, then the number of items behind each column."""
    header = ["", "runs", *(column.removeprefix("testbed_") for column in section.columns)]
    lines = [
        [label, str(runs) if runs else EMPTY, *(cell_text(column, cells.get(column)) for column in section.columns)]
        for label, runs, cells in section.rows
    ]
    return [header, *_items(section), *lines]


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
        header, *lines = grid(section)
        table = [header, ["---"] * len(header), *lines]
        parts += [f"## {section.model}", "\n".join("| " + " | ".join(line) + " |" for line in table)]
    return "\n\n".join([*parts, " ".join(notes(sections))]) + "\n"


def latex(definition: Definition, sections: Sequence[Section]) -> str:
    """Return a tabular environment for each model (booktabs)."""
    parts = [f"% {title(definition, sections)}"]
    for section in sections:
        header, *lines = [[_escaped(cell) for cell in line] for line in grid(section)]
        parts.append(
            "\n".join(
                [
                    f"% {section.model}",
                    rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
                    r"\toprule",
                    " & ".join(header) + r" \\",
                    r"\midrule",
                    *(" & ".join(line) + r" \\" for line in lines),
                    r"\bottomrule",
                    r"\end{tabular}",
                ]
            )
        )
    return "\n\n".join([*parts, "% " + " ".join(notes(sections))]) + "\n"


def _escaped(text: str) -> str:
    escaped = {character: f"\\{character}" for character in "&%_#${}"}
    escaped |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(escaped.get(character, character) for character in text)


def comma_separated(sections: Sequence[Section]) -> str:
    """Return one row a cell: model, row, runs, column, source, value, stderr, low, high, n."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["model", "row", "runs", "column", "source", "value", "stderr", "low", "high", "n"])
    for section in sections:
        for label, runs, cells in section.rows:
            for column in section.columns:
                cell, measured = cells.get(column), not column.endswith(PAPER_MARK)
                if cell is None:
                    continue
                numbers = (cell.value, cell.stderr, cell.low, cell.high)
                texts = ["" if x is None else f"{x:.10g}" for x in numbers]
                source = ["starquant" if measured else "paper", *texts, EMPTY if cell.n is None else cell.n]
                writer.writerow(
                    [section.model, label, runs if measured else "", column.removesuffix(PAPER_MARK), *source]
                )
    return stream.getvalue()


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
