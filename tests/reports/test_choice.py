"""Which records a table takes: limits only when asked for, nothing inert, hints that choose, no stale file."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from starquant.errors import ConfigError, RecordError
from starquant.reports import comparison
from starquant.reports.__main__ import main
from starquant.reports.across_seeds import main as across_seeds
from starquant.reports.after_sweep import after_sweep
from starquant.reports.choice import condition, conditions, differences, in_words
from starquant.reports.definitions import FIGURES, TABLES
from starquant.reports.experiments import build, table
from starquant.reports.frame import pivot, scores_frame
from starquant.reports.selection import read_runs
from tests.support.records import edit_record
from tests.support.tables import FACTS, PROFILES, answers, put

WHOLE, CUT = answers(0, 12), answers(0, 12)[:4]
INERT: dict[str, Any] = {
    "export.dir": "somewhere",
    "paths.results": "elsewhere",
    "runtime.threads": 3,
    "dry_run": True,
    "experiment.name": "another",
    "tracker.project": "mine",
    "model.testbed": "smol",
    "tasks.allow_code_execution": True,
    "speed.name": "few_draws",  # of no draws
}


def runs_of(folder: Path, name: str = "table1_main", **more: Any) -> dict[str, int]:
    return {label: runs for label, runs, _ in table(name, folder, **more)[0].rows if runs}


def moved(folder: Path, path: Path, name: str = "b") -> Path:
    """A record and its items under a folder of its own, as another results folder would bring them."""
    target = folder / "records" / name / path.name
    target.parent.mkdir(parents=True)
    shutil.move(path, target)
    shutil.move(path.with_suffix(".items"), target.with_suffix(".items"))
    return target


@pytest.mark.parametrize("name", [*TABLES, "figure3_trajectory"])
def test_limits_enter_no_table_unless_asked_for(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    definition = {**TABLES, **FIGURES}[name]
    row = definition.rows[-1].where
    bits = row.get("bits.name", "w4a4")
    changes = {key: value for key, value in row.items() if key.startswith("method.tac.")}
    kl = {"kl": [0.1, 0.2]} if name in FIGURES else {}

    def add(values: list[float], limit: int | None) -> None:
        scored = {} if name in FIGURES else {FACTS: values}
        put(tmp_path, scored, row["method.name"], bits, changes={**changes, "tasks.limit": limit}, **kl)

    add(CUT, 4)
    words = [name, "--records", str(tmp_path)]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    way = re.search(r"--where \S+?(?= takes)", said)
    assert way is not None and f"no record of {name} on all items; 1 record with tasks.limit left out" in said
    if name in FIGURES:
        return  # its items hold no hidden error to draw
    assert main([*words, *shlex.split(way[0])]) == 0
    cut = (tmp_path / "tables" / f"{name}.md").read_text()
    heading = cut.splitlines()[0]
    assert heading.startswith(f"# {definition.title}") and heading.endswith(": the first 4 items of each task only")
    assert "| items |  | 4 | " in cut
    add(WHOLE, None)
    capsys.readouterr()
    assert main(words) == 0
    whole = (tmp_path / "tables" / f"{name}.md").read_text()
    assert whole.splitlines()[0] == heading.removesuffix(": the first 4 items of each task only")
    assert "| items |  | 12 | " in whole
    note = f"note: {name}: 1 record with tasks.limit left out (--where tasks.limit=4 takes it)\n"
    assert capsys.readouterr().err == note


def test_a_sweep_that_was_cut_asks_for_its_own_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, {FACTS: CUT}, "star_quant", changes={"tasks.limit": 4})
    assert after_sweep("table2_ablation", tmp_path, 4)
    assert "the first 4 items" in capsys.readouterr().out
    assert not after_sweep("table2_ablation", tmp_path)
    assert "--where tasks.limit=4 takes it" in capsys.readouterr().err
    assert not after_sweep("table2_ablation", tmp_path, 5)
    assert f"--where tasks.limit=4 takes it) (starquant tables table2_ablation --records {tmp_path})" in (
        capsys.readouterr().err
    )


def test_a_sweep_that_was_cut_and_is_not_of_the_table_leaves_it_to_the_others(tmp_path: Path) -> None:
    """`experiment=smol_main tasks=smol tasks.limit=64`: the table is of fidelity, which was run before."""
    put(tmp_path, {FACTS: WHOLE}, "star_quant")
    put(tmp_path, {FACTS: CUT}, "star_quant", "w8a8", changes={"tasks.limit": 4})
    assert after_sweep("table2_ablation", tmp_path, 4)
    assert "| items |  | 12 | " in (tmp_path / "tables" / "table2_ablation.md").read_text()


@pytest.mark.parametrize("key", INERT)
def test_what_changes_no_figure_makes_no_second_row(tmp_path: Path, key: str) -> None:
    """Beside the record it stands in, and beside one of other tasks, where the two are joined."""
    moved(tmp_path, put(tmp_path, {FACTS: WHOLE}, changes={key: INERT[key]}))
    put(tmp_path, {FACTS: WHOLE})
    assert runs_of(tmp_path) == {"RTN": 1}
    put(tmp_path, {PROFILES: WHOLE}, changes={key: INERT[key]})
    assert runs_of(tmp_path) == {"RTN": 1}
    assert differences(*read_runs(tmp_path)[:2]) in ([], ["tasks.names"])


def test_records_of_another_version_are_compared_without_what_is_inert(tmp_path: Path) -> None:
    paths = [put(tmp_path, {FACTS: WHOLE}, changes={"bits.weights.clip_ratio": clip}) for clip in (1.0, 0.9)]
    before = paths[0].read_text()

    def of_another_version(data: dict[str, Any]) -> None:
        text = json.dumps(data["spec"]).replace('"clip_search"', '"search_of_clips"')
        data["spec"] = json.loads(text.replace('"threads": null', '"threads": 7'))

    edit_record(paths[0], of_another_version)
    assert paths[0].read_text() != before
    differ = differences(*read_runs(tmp_path))
    assert "bits.weights.clip_ratio" in differ
    assert not [key for key in differ if key.startswith(("runtime", "export", "paths"))]


def test_a_path_that_a_fingerprint_stands_for_makes_no_second_row(tmp_path: Path) -> None:
    for folder, path in (("a", "x/llada"), ("b", "y/llada")):
        changes = {"model.path": path, "model.fingerprint": "f"}
        moved(tmp_path, put(tmp_path, {FACTS: WHOLE}, changes={**changes, "model.seed": None}), folder)
    assert runs_of(tmp_path) == {"RTN": 1}


def test_one_experiment_with_two_scores_is_refused(tmp_path: Path) -> None:
    moved(tmp_path, put(tmp_path, {FACTS: [1.0, 0.0]}, changes={"export.dir": "x"}))
    put(tmp_path, {FACTS: [1.0, 1.0]})
    with pytest.raises(RecordError, match=r"they are of one experiment and differ in testbed_facts acc \(.*; give a f"):
        runs_of(tmp_path)


def test_a_run_of_some_of_the_tasks_gives_way_where_its_scores_are_the_same(tmp_path: Path) -> None:
    put(tmp_path, {FACTS: WHOLE}, changes={"tasks.name": "one"})
    put(tmp_path, {PROFILES: CUT}, changes={"tasks.name": "other"})
    put(tmp_path, {FACTS: WHOLE, PROFILES: CUT})
    [section] = [s for s in table("table1_main", tmp_path) if s.model == "tiny"]
    [(runs, cells)] = [(runs, cells) for label, runs, cells in section.rows if label == "RTN"]
    assert (runs, cells[FACTS].n, cells[PROFILES].n) == (1, 12, 4)


def test_a_rows_runs_have_the_same_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, {FACTS: WHOLE, PROFILES: WHOLE}, "quarot", seed=0)
    for seed in (1, 2):
        put(tmp_path, {FACTS: WHOLE}, "quarot", seed=seed)
    assert runs_of(tmp_path) == {"QuaRot": 1}
    assert "note: tiny: QuaRot: 2 of 3 runs scored some of the tasks only" in capsys.readouterr().err


CONFLICTS = [
    ("smoothquant", "method.alpha", 0.5, 0.7),
    ("star_quant", "method.tac.damping", 1e-05, 0.1),
    ("rtn", "model.fingerprint", "1234567890123456", "12e4567812345678"),
    ("rtn", "model.fingerprint", None, "null"),
    ("rtn", "model.revision", None, "a b'c"),
    ("rtn", "tasks.data_dir", None, "my data=x"),
    ("rtn", "bits.weights.symmetric", True, False),
    ("smoothquant", "method.sites", ["qkv_input"], ["qkv_input", "gate_up_input"]),
]


@pytest.mark.parametrize(("method", "key", "one", "other"), CONFLICTS)
def test_the_hint_of_a_conflict_chooses_one_and_keeps_the_other_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, key: str, one: Any, other: Any
) -> None:
    for value in (one, other):
        put(tmp_path, {FACTS: WHOLE}, method, changes={key: value})
    put(tmp_path, {FACTS: WHOLE}, "awq", changes={key: one} if not key.startswith(("method", "bits")) else {})
    words = ["table1_main", "--records", str(tmp_path)]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"they differ in {key} (" in said
    ways = said.partition("choose by ")[2].partition(", or give a folder")[0].split(" or --where ")
    assert len(ways) == 2
    for way, value in zip(ways, (one, other) if f"({one} and" in said else (other, one), strict=True):
        assert main([*words, "--where", *shlex.split(way.removeprefix("--where "))]) == 0
        assert condition(*shlex.split(way.removeprefix("--where "))) == (key, value)
        table_of = (tmp_path / "tables" / "table1_main.md").read_text().partition("## LLaDA")[0]
        assert "| AWQ | 1 |" in table_of or not key.startswith("method")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("None", None),
        ("null", None),
        ("", None),
        ("1e-05", 1e-05),
        ("1.0e-05", 1e-05),
        ("16", 16),
        ("[a, b]", ["a", "b"]),
    ],
)
def test_values_of_conditions(text: str, value: Any) -> None:
    assert condition(f"a.b={text}") == ("a.b", value)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, 16, 1e-05, 0.5, "w4a4", "None", "null", "16", "1e5", "a b", "it's", "", "x: y", ["a", 1], "{"],
)
def test_a_condition_in_words_is_read_as_it_was(value: Any) -> None:
    option, text = shlex.split(in_words("a.b", value))
    key, read = condition(text)
    assert (option, key, read, type(read)) == ("--where", "a.b", value, type(value))


def test_a_key_with_two_values_is_refused() -> None:
    assert conditions(["a=1", "b=None", "a=1"]) == {"a": 1, "b": None}
    with pytest.raises(ConfigError, match=r"^--where: a: got 1 and 2; allowed: one value a key"):
        conditions(["a=1", "a=2"])


def test_none_chooses_the_record_that_does_not_have_it(tmp_path: Path) -> None:
    for folder in (None, "x"):
        put(tmp_path, {FACTS: WHOLE}, changes={"tasks.data_dir": folder})
    assert main(["table1_main", "--records", str(tmp_path)]) == 2
    assert main(["table1_main", "--records", str(tmp_path), "--where", "tasks.data_dir=None"]) == 0


def test_records_of_the_experiment_come_before_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the sweep that has ended first, whatever their name says."""
    own = {"experiment.name": "table1_main"}
    put(tmp_path, {FACTS: [1.0, 1.0]}, "smoothquant", changes=own)
    other = put(tmp_path, {FACTS: [0.0, 0.0]}, "smoothquant", changes={"method.alpha": 0.7})

    def value(**more: Any) -> float:
        rows = {label: cells for label, _, cells in table("table1_main", tmp_path, **more)[0].rows}
        return rows["SmoothQuant"][FACTS].value

    assert value() == 100
    assert "made by the experiment, not tiny-w4a4-smoothquant-" in (said := capsys.readouterr().err)
    assert "method.alpha is 0.85, not 0.7" in said
    assert value(made=[other.name]) == 0
    assert value(where={"method.alpha": 0.7}) == 0
    put(tmp_path, {FACTS: [0.0, 0.0]}, "smoothquant", changes={**own, "method.alpha": 0.9})
    with pytest.raises(RecordError, match=r"they differ in method\.alpha"):
        value()


def test_a_table_that_cannot_be_built_leaves_no_stale_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, {FACTS: WHOLE}, "star_quant")
    paths = build("table2_ablation", tmp_path, tmp_path)
    other = tmp_path / "tables" / "table1_main.md"
    other.write_text("of another experiment")
    before = [path.read_bytes() for path in paths]
    words = ["table2_ablation", "--records", str(tmp_path)]
    assert main([*words, "--where", "method.no=1"]) == 2  # of the question, not of the records
    assert main([*words[:1], "--records", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    assert all(path.exists() for path in paths)
    capsys.readouterr()
    put(tmp_path, {FACTS: WHOLE}, "star_quant", changes={"method.tac.damping": 0.3})
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("set aside as NAME.stale: table2_ablation.md, table2_ablation.tex, table2_ablation.csv\n")
    assert not any(path.exists() for path in paths)
    assert [path.with_name(f"{path.name}.stale").read_bytes() for path in paths] == before
    assert other.exists()
    assert main(words) == 2
    assert "NAME.stale" not in capsys.readouterr().err


def test_the_other_tables_leave_limits_out_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, {FACTS: WHOLE}, told={"n": 12})
    for method in ("rtn", "awq"):
        put(tmp_path, {FACTS: CUT}, method, told={"n": 4}, changes={"tasks.limit": 4})
    shutil.copytree(tmp_path / "records", tmp_path / "copies" / "a")
    shutil.copytree(tmp_path / "records", tmp_path / "copies" / "b")
    for command in (across_seeds, comparison.main):
        for folder in ("records", "copies"):
            assert command([str(tmp_path / folder)]) == 0
            said = capsys.readouterr()
            assert "left out (--where tasks.limit=4 takes those)" in said.err
            assert "awq" not in said.out
            assert "| 12 |" in said.out
        assert command([str(tmp_path / "records"), "--where", "tasks.limit=4"]) == 0
        said = capsys.readouterr()
        assert "awq" in said.out
        assert "| 4 |" in said.out
        assert "| 12 |" not in said.out
        put(tmp_path, {FACTS: WHOLE}, changes={"bits.weights.clip_ratio": 0.9})
        assert command([str(tmp_path / "records")]) == 2
        [*_, line] = capsys.readouterr().err.splitlines()
        way = re.search(r"--where bits\.weights\.clip_ratio=\S+?(?= or)", line)
        assert way is not None
        assert command([str(tmp_path / "records"), *shlex.split(way[0])]) == 0
        capsys.readouterr()
        for path in (tmp_path / "records").glob("*"):
            if "rtn" in path.name and '"clip_ratio": 0.9' in (path.read_text() if path.is_file() else ""):
                path.unlink()
    assert list(pivot(scores_frame(tmp_path / "copies")).index.get_level_values("method")) == ["rtn"]
