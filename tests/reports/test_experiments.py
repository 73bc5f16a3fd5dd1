"""From a results folder to files, and the command line: what is built, what is refused, and that nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from starquant.errors import ConfigError, RecordError
from starquant.reports import figures
from starquant.reports.__main__ import main
from starquant.reports.after_sweep import after_sweep
from starquant.reports.choice import condition
from starquant.reports.definitions import FIGURES, PAPER, TABLES, Definition, RowOf
from starquant.reports.experiments import NAMES, build, table
from tests.support.paths import REPOSITORY
from tests.support.tables import FACTS, answers, put, put_table

FIGURE3, SOFTMAX_V = "figure3_trajectory", "w4a4_softmax_v"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    put_table(folder)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def report(folder: Path, name: str = "tiny-0", **changes: Any) -> Path:
    state = {"density": [0.0, 0.1, 0.3, 0.1], "channel_absmax": [1.0, 2.0, 3.0]}
    rows = [{"site": s, "block": 0, "width": 3, "masked": state, "unmasked": state} for s in ("qkv_input", "out_input")]
    content = {"kind": "activations", "schema_version": 1, "name": name, "half_range": 8.0, "rows": rows} | changes
    path = folder / "activations" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_every_experiment_has_its_table_or_figure() -> None:
    presets = {path.stem: path.read_text() for path in (REPOSITORY / "conf" / "experiment").glob("*.yaml")}
    del presets["none"]
    assert {*NAMES} == {name for name, text in presets.items() if "benchmark:" not in text}  # which has no records
    assert {*presets} - {*NAMES} == {"table4_efficiency"}
    assert PAPER == REPOSITORY / "results" / "paper"


def test_a_table_is_printed_as_paths(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table1_main", "table2_ablation", "--records", str(records), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    names = [f"{name}{suffix}" for name in ("table1_main", "table2_ablation") for suffix in (".md", ".tex", ".csv")]
    assert said.out.split() == [str(tmp_path / "tables" / name) for name in names]
    assert said.err == ""
    assert all((tmp_path / "tables" / name).stat().st_size for name in names)


def test_tables_lie_in_the_results_folder_unless_told(tmp_path: Path) -> None:
    put(tmp_path, {FACTS: answers(0)}, "star_quant")
    assert main(["table2_ablation", "--records", str(tmp_path)]) == 0
    assert (tmp_path / "tables" / "table2_ablation.md").exists()


def twice(folder: Path) -> None:
    for damping in (0.1, 0.2):
        put(folder, {FACTS: answers(0)}, "star_quant", changes={"method.tac.damping": damping})


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda folder: None, ["table1_main"], "holds no record of table1_main"),
        (lambda folder: folder.rmdir(), ["table1_main"], "no such folder of records"),
        (lambda folder: folder.rmdir(), [FIGURE3], "no such folder of records"),
        (lambda folder: None, [FIGURE3], "holds no record of figure3_trajectory"),
        (lambda folder: None, ["figure1_activations"], "activations: holds no report; run experiment=figure1"),
        (lambda folder: None, ["table9"], "got 'table9', allowed: table1_main, table2_ablation, "),
        (twice, ["table1_main"], r"STaR-Quant: .* they differ in method.tac.damping (0."),
        (
            lambda folder: put(folder, {FACTS: answers(0)}, dirty=True),
            ["table1_main"],
            "1 of 1 records are of code that was not committed",
        ),
        (lambda folder: put(folder, {FACTS: answers(0)}, kl=[1.0]), [FIGURE3], "holds no record of figure3"),
        (lambda folder: put(folder, {FACTS: answers(0)}, "quarot", "w8a8"), ["table1_main"], "holds no record of tab"),
        (lambda folder: report(folder, "b", kind="other"), ["figure1_activations"], "b.json: not a report of activ"),
        (twice, ["table1_main", "--where", "method.tac.damping"], "allowed: KEY=VALUE"),
        (twice, ["table1_main", "--where", "=3"], "--where: got '=3', allowed: KEY=VALUE"),
        (twice, ["table1_main", "--where", "method.tac.damping={"], "whose value is not YAML"),
        (twice, ["table1_main", "--where", "method.tac.dampng=0.1"], "no record has method.tac.dampng=0.1 (--where)"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Any, arguments: list[str], message: str
) -> None:
    (tmp_path / "results").mkdir()
    prepare(tmp_path / "results")
    before = files(tmp_path)
    out = tmp_path / "out"
    assert main([*arguments, "--records", str(tmp_path / "results"), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    *parts, last = message.split(" .* ")
    assert all(part in said.err for part in (*parts, last))
    assert files(tmp_path) == before


def test_an_unknown_name_to_allow_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table1_main", "--records", str(tmp_path), "--allow", "everything"]) == 2
    assert "--allow: got 'everything', allowed: dirty, versions" in capsys.readouterr().err


def test_what_is_allowed_gets_through_the_command_line(tmp_path: Path) -> None:
    put(tmp_path, {FACTS: answers(0)}, dirty=True)
    put(tmp_path, {FACTS: answers(0)}, "quarot", told={"task_version": "2.0"})
    assert main(["table1_main", "--records", str(tmp_path), "--allow", "dirty"]) == 2
    assert main(["table1_main", "--records", str(tmp_path), "--allow", "dirty", "versions"]) == 0


@pytest.mark.parametrize("below", ["", "/more/folders"])
def test_a_file_is_no_place_for_tables(tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["table1_main", "--records", str(tmp_path), "--out", f"{tmp_path}/file{below}"]) == 2
    line = f"error: --out: {tmp_path}/file{below}: is a file, or below one; allowed: a folder\n"
    assert capsys.readouterr().err == line


def test_conditions_are_yaml() -> None:
    assert condition("a.b=16") == ("a.b", 16)
    assert condition("a=null") == ("a", None)
    assert condition("a=w4a4=x") == ("a", "w4a4=x")


def test_where_chooses_one_of_two_records_and_keeps_full_precision(tmp_path: Path) -> None:
    twice(tmp_path)
    put(tmp_path, {FACTS: answers(1)}, "none", "w16a16")
    with pytest.raises(RecordError, match=r"choose by --where method\.tac\.damping=0\.[12] or"):
        table("table1_main", tmp_path)
    tiny = table("table1_main", tmp_path, where={"method.tac.damping": 0.2})[0]
    assert [label for label, runs, _ in tiny.rows if runs] == ["full precision", "STaR-Quant"]


def test_where_chooses_among_records_of_full_precision(tmp_path: Path) -> None:
    put(tmp_path, {FACTS: answers(0)}, "rtn")
    for fingerprint, values in (("a", [1.0] * 12), ("b", [0.0] * 12)):
        put(tmp_path, {FACTS: values}, "none", "w16a16", changes={"model.fingerprint": fingerprint})
        put(tmp_path, {FACTS: answers(0)}, "awq", changes={"model.fingerprint": fingerprint})
    with pytest.raises(RecordError, match=r"they differ in model\.fingerprint \("):
        table("table1_main", tmp_path)
    tiny = table("table1_main", tmp_path, where={"model.fingerprint": "b"})[0]
    assert {label: cells[FACTS].value for label, runs, cells in tiny.rows if label == "full precision"} == {
        "full precision": 0.0
    }
    assert {label: runs for label, runs, _ in tiny.rows if runs} == {"full precision": 1, "AWQ": 1}


def test_unknown_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"got '{FIGURE3}', allowed: table1_main"):
        table(FIGURE3, tmp_path)


def lines_of(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, list[str]]:
    """Build figure 3; returns the stems of the records behind each label."""
    seen: dict[str, list[str]] = {}
    drawn = figures.trajectory

    def spy(records: Any, metric: str = "hidden_mse") -> Any:
        for label, path in records:
            seen.setdefault(label, []).append(path.stem)
        return drawn(records, "kl")

    monkeypatch.setattr(figures, "trajectory", spy)
    paths = build(FIGURE3, folder, out, **more)
    assert [path.relative_to(out) for path in paths] == [Path("figures") / f"{FIGURE3}{s}" for s in (".png", ".pdf")]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    return seen


def test_figure_3_has_a_line_for_each_method_and_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kl = [0.1, 0.2]
    made = {
        "no TAC": put(tmp_path, {}, "star_quant_no_tac", SOFTMAX_V, kl=kl),
        "TAC": put(tmp_path, {}, "star_quant", SOFTMAX_V, kl=kl),
        "no TAC, softmax.V at 16 bits": put(tmp_path, {}, "star_quant_no_tac", "w4a4", kl=kl),
    }
    put(tmp_path, {}, "star_quant", "w4a4", kl=kl)
    put(tmp_path, {}, "star_quant", SOFTMAX_V, kl=kl, changes={"method.tac.block_size": 8})
    put(tmp_path, {FACTS: answers(0)}, "star_quant_no_tac", "w4a4", kl=kl)  # of table 2
    put(tmp_path, {FACTS: answers(0)}, "star_quant", SOFTMAX_V)
    seen = lines_of(tmp_path, tmp_path / "out", monkeypatch)
    assert seen == {label: [path.stem] for label, path in made.items()}


@pytest.mark.parametrize(
    ("other", "message", "where"),
    [
        ({"model": "llada"}, "holds records of llada, tiny; choose by --where model.name=", {"model.name": "tiny"}),
        ({"changes": {"method.tac.damping": 0.5}}, r"TAC: .* method.tac.damping \(", {"method.tac.damping": 0.5}),
        (
            {"changes": {"fidelity.positions": 3}, "rotation": 1},
            r"follow other trajectories; they differ in fidelity\.positions .* choose by --where fidelity\.positions=",
            {"fidelity.positions": 3},
        ),
    ],
)
def test_figure_3_mixes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], message: str, where: dict[str, Any]
) -> None:
    put(tmp_path, {}, "star_quant", SOFTMAX_V, kl=[0.1, 0.2])
    put(tmp_path, {}, "star_quant", SOFTMAX_V, kl=[0.1, 0.2], **other)
    with pytest.raises(RecordError, match=message):
        build(FIGURE3, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(lines_of(tmp_path, tmp_path / "out", monkeypatch, where=where)["TAC"]) == 1


def test_figure_1_is_drawn_for_every_report_and_site(tmp_path: Path) -> None:
    report(tmp_path, "tiny-1")
    report(tmp_path, "tiny-0")
    paths = build("figure1_activations", tmp_path, tmp_path / "out")
    stems = [f"figure1_activations-{r}-{s}" for r in ("tiny-0", "tiny-1") for s in ("qkv_input", "out_input")]
    assert [path.name for path in paths] == [stem + suffix for stem in stems for suffix in (".png", ".pdf")]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_no_figure_is_written_where_one_report_is_damaged(tmp_path: Path) -> None:
    report(tmp_path, "a")
    report(tmp_path, "b").write_text("[")
    with pytest.raises(RecordError, match=r"b\.json: not readable as a report"):
        build("figure1_activations", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_after_a_sweep_its_table_is_shown_or_said_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after_sweep("none", tmp_path)
    assert capsys.readouterr() == ("", "")
    after_sweep("table2_ablation", tmp_path)
    said = capsys.readouterr()
    assert said.out == ""
    assert "error: table2_ablation was not built: " in said.err
    put(tmp_path, {FACTS: answers(0)}, "star_quant")
    after_sweep("table2_ablation", tmp_path)
    out = capsys.readouterr().out
    assert "| STaR-Quant | 1 |" in out
    assert f"wrote {tmp_path / 'tables' / 'table2_ablation.csv'}" in out


def test_a_definition_whose_labels_name_no_one_row_is_refused() -> None:
    rows = (RowOf("a", {}), RowOf("b", {}))
    with pytest.raises(ValueError, match="against is 'c', allowed: a, b"):
        Definition("mine", "Mine", rows, against="c")
    with pytest.raises(ValueError, match="rows share a label: a, b, a"):
        Definition("mine", "Mine", (*rows, rows[0]))


def test_every_row_is_of_a_method_that_there_is_and_every_figure_has_a_function() -> None:
    methods = {path.stem for path in (REPOSITORY / "conf" / "method").glob("*.yaml")}
    for definition in (*TABLES.values(), *FIGURES.values()):
        assert {row.where["method.name"] for row in definition.rows} <= methods, definition.name
    assert all(callable(getattr(figures, str(definition.draw))) for definition in FIGURES.values())
