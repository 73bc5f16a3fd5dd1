"""The sweeper: every cell is validated once, before the first one runs; a job takes its cell as it was validated."""

from __future__ import annotations

import ast
import importlib
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from starquant.config.run import RunSpec
from starquant.errors import ConfigError
from starquant.sweeps import command_line
from starquant.sweeps.cells import Cell
from starquant.sweeps.command_line import main, parse_command_line, plan_of, validate_command_line
from starquant.sweeps.jobs import CellRunner
from starquant.sweeps.overrides import CONF, expand, parse_overrides
from starquant.sweeps.sweeper import CellSweeper, Jobs, opened
from tests.support.paths import REPOSITORY
from tests.support.specs import spec
from tests.support.sweeps import Runner


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells that `main` runs, in order; nothing is computed."""
    cells: list[Cell] = []
    monkeypatch.setattr(command_line, "CellRunner", lambda: Runner(cells.append))
    return cells


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """Every specification that is made from a configuration."""
    specs: list[RunSpec] = []
    original = RunSpec.from_config

    def counted(config: dict[str, Any]) -> RunSpec:
        specs.append(original(config))
        return specs[-1]

    monkeypatch.setattr(RunSpec, "from_config", counted)
    return specs


def test_hydra_finds_the_sweeper_by_itself() -> None:
    with opened() as context:
        command = parse_command_line(["-m", "method=rtn", "seed=1,2"])
        sweeper = validate_command_line(command, context).sweeper
    assert isinstance(sweeper, CellSweeper)
    assert type(sweeper) in Plugins.instance().discover(Sweeper)
    assert ConfigStore.instance().load("hydra/sweeper/starquant.yaml").node.params is None


def test_a_bad_last_cell_is_refused_before_the_first_one_runs(
    tmp_path: Path, ran: list[Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-m", "method=rtn", "bits.weights.bits=4,8,5", f"paths.results={tmp_path / 'results'}"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == "error: bits.weights.bits: got 5, allowed: 2, 3, 4, 8, 16.\n"
    assert ran == []
    assert not (tmp_path / "results").exists()


def test_each_job_has_the_specification_that_was_validated(
    tmp_path: Path, ran: list[Cell], validated: list[RunSpec]
) -> None:
    assert main(["-m", "bits=w4a4,w8a8", "method=rtn,quarot", f"paths.results={tmp_path}"]) == 1  # no cell left a file
    assert len(validated) == len(ran) == 4
    assert all(cell.spec is one for cell, one in zip(ran, validated, strict=True))
    assert [(cell.spec.bits.name, cell.spec.method.name) for cell in ran] == [
        ("w4a4", "rtn"),
        ("w4a4", "quarot"),
        ("w8a8", "rtn"),
        ("w8a8", "quarot"),
    ]


def test_a_repeated_cell_runs_once(tmp_path: Path, ran: list[Cell]) -> None:
    main(["-m", "bits=w8a8,w4a4", "method=none,rtn", "seed=1,1", f"paths.results={tmp_path}"])
    assert [cell.name for cell in ran] == [
        "tiny:0 w16a16 none testbed",
        "tiny:0 w8a8 rtn testbed",
        "tiny:0 w4a4 rtn testbed",
    ]


def test_a_single_run_is_composed_and_validated_once(
    tmp_path: Path, ran: list[Cell], validated: list[RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = []
    original = command_line.hydra.compose
    monkeypatch.setattr(command_line.hydra, "compose", lambda *a, **k: composed.append(k) or original(*a, **k))
    main(["bits=w8a8", "method=rtn", f"paths.results={tmp_path}"])
    (cell,) = ran
    assert cell.spec is validated[0]
    assert (len(validated), len(composed)) == (1, 1)


def test_main_can_be_called_again(tmp_path: Path, ran: list[Cell]) -> None:
    words = list(sys.argv)
    for seed in (1, 2):
        main(["method=rtn", f"seed={seed}", f"paths.results={tmp_path}"])
        main(["-m", "method=rtn", f"seed={seed},{seed + 10}", f"paths.results={tmp_path}"])
    assert [cell.spec.seed for cell in ran] == [1, 1, 11, 2, 2, 12]
    assert sys.argv == words


def test_cells_that_share_a_composition_are_those_composed_alone() -> None:
    """Plain values are set in a configuration that is there; added, deleted, nested and repeated ones are not."""
    words = ("method=star_quant,star_quant_no_tac", "seed=1,2", "method.tac.block_size=4,8", "+experiment.name=a")
    plan = plan_of(["-m", *words])
    assert plan is not None
    assert len(plan.cells) == 8
    for cell, overrides in zip(plan.cells, plan.overrides, strict=True):
        assert cell.spec == spec(*overrides)
    nested = plan_of(["-m", "method=rtn", "runtime.threads=1,2", "runtime={threads: 3}"])
    assert nested is not None
    assert [cell.spec.runtime.threads for cell in nested.cells] == [3]
    lists = plan_of(["-m", "method=rtn", "tasks.names=[testbed_facts],[testbed_programs]", "fidelity=none"])
    assert lists is not None
    assert [cell.spec.tasks.names for cell in lists.cells] == [("testbed_facts",), ("testbed_programs",)]


def test_the_product_is_in_hydras_order() -> None:
    with opened() as context:
        overrides = parse_overrides(["a=1,2", "~b", "c=range(0,2)", "a=3,4", "+d='x,y'"], context.config_loader)
    assert list(expand(overrides)) == [
        ["a=3", "~b", "c=0", "+d='x,y'"],
        ["a=3", "~b", "c=1", "+d='x,y'"],
        ["a=4", "~b", "c=0", "+d='x,y'"],
        ["a=4", "~b", "c=1", "+d='x,y'"],
    ]


def test_the_command_line_wins_over_an_experiment_in_its_place() -> None:
    plan = plan_of(["experiment=table2_ablation", "model=tiny", "bits=w8a8,w4a4"])
    assert plan is not None
    assert [(cell.spec.bits.name, cell.spec.method.name) for cell in plan.cells][:4] == [
        ("w8a8", "star_quant_no_tac"),
        ("w8a8", "star_quant_no_sgat"),
        ("w8a8", "star_quant"),
        ("w4a4", "star_quant_no_tac"),
    ]


def test_a_key_is_deleted_in_single_runs_and_sweeps() -> None:
    key = "model.protocol.testbed_facts.mc_num"
    assert spec().model.protocol["testbed_facts"].mc_num is not None
    for sweep in ([], ["-m", "seed=1,2"]):
        plan = plan_of(["method=rtn", "tasks.names=[testbed_programs]", f"~{key.rpartition('.')[0]}", *sweep])
        assert plan is not None
        assert all("testbed_facts" not in cell.spec.model.protocol for cell in plan.cells)
    with pytest.raises(ConfigError, match=r"Could not delete from config. 'nothing' does not exist"):
        plan_of(["~nothing"])


def test_a_folder_of_ones_own_options(tmp_path: Path, ran: list[Cell]) -> None:
    (tmp_path / "bits").mkdir()
    own = (CONF / "bits" / "w4a4.yaml").read_text().replace("name: w4a4", "name: w4a4_mine")
    (tmp_path / "bits" / "w4a4_mine.yaml").write_text(own)
    for sweep in ([], ["-m"]):
        main(["--config-dir", str(tmp_path), "bits=w4a4_mine", "method=rtn", f"paths.results={tmp_path}/r", *sweep])
    assert [cell.spec.bits.name for cell in ran] == ["w4a4_mine"] * 2
    with pytest.raises(ConfigError, match=r"--config-dir: .*/nowhere: no such folder"):
        plan_of(["--config-dir", f"{tmp_path}/nowhere"])


def test_hydras_settings_reach_the_launcher(tmp_path: Path, ran: list[Cell]) -> None:
    results, folder = tmp_path / "it's, here", tmp_path / "jobs"
    main(["-m", "method=rtn", "seed=1,2", f"paths.results='{results!s}'".replace("it's", r"it\'s")])
    (named,) = (results / "sweeps").iterdir()
    assert (named / "multirun.yaml").exists()
    main(["-m", "method=rtn", "seed=1,2", f"paths.results={tmp_path}/r", f"hydra.sweep.dir={folder}"])
    assert (folder / "multirun.yaml").exists()
    assert not (tmp_path / "r" / "sweeps").exists()
    assert len(ran) == 4


def test_a_batch_at_a_time(tmp_path: Path, ran: list[Cell]) -> None:
    main(["-m", "method=rtn", "seed=1,2,3", "hydra.sweeper.max_batch_size=2", f"paths.results={tmp_path}"])
    assert [cell.spec.seed for cell in ran] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--multirn"], r"--multirn: unknown option; allowed: --cfg, .*\. Did you mean '--multirun'\?"),
        (["--cfg", "jobs"], r"argument --cfg/-c: invalid choice: 'jobs'"),
        (["--cfg", "job", "-m"], r"--cfg: got -m too"),
        (["-m", "method=rtn", "hydra.verbose=true,false"], r"hydra.verbose: got several values"),
        (["-m", "method=rtn", "hydra/sweeper=basic"], r"hydra/sweeper: got 'basic', allowed: starquant"),
        (["hydra.callbacks.mine._target_=a.B"], r"hydra.callbacks.mine._target_: callbacks of Hydra are not called"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        plan_of(arguments)


def test_cells_travel_to_workers(tmp_path: Path) -> None:
    plan = plan_of(["-m", "method=rtn", "seed=1,2"])
    assert plan is not None
    jobs = Jobs(plan.cells, CellRunner())
    assert pickle.loads(pickle.dumps(jobs)) == jobs


def test_no_private_name_of_hydra_and_no_rewritten_command_line() -> None:
    files = [*(REPOSITORY / "starquant").rglob("*.py"), *(REPOSITORY / "hydra_plugins").rglob("*.py")]
    offences = []
    for path in [*files, REPOSITORY / "run.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                full = ".".join(names[:1]).split(".") + [part for name in names[1:] for part in name.split(".")]
                offences += [path.name] if "hydra" in full and any(p[:1] == "_" for p in full) else []
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                offences += [path.name for target in targets if "sys.argv" in ast.unparse(target)]
    assert offences == []


def test_dispatch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from starquant import __main__ as commands

    calls: list[tuple[str, list[str]]] = []
    for name, (module, _) in commands.COMMANDS.items():
        imported = importlib.import_module(module)
        monkeypatch.setattr(imported, "main", lambda words, name=name: calls.append((name, words)) or 7)
    for words in (["bits=w8a8"], ["-m", "seed=1,2"], ["run", "a=1"], ["status", "x"], ["tables", "x"], ["evaluate"]):
        assert commands.main(words) == 7
    assert commands.main(["generate", "DIR", "prompt"]) == 7
    assert calls == [
        ("run", ["bits=w8a8"]),
        ("run", ["-m", "seed=1,2"]),
        ("run", ["a=1"]),
        ("status", ["x"]),
        ("tables", ["x"]),
        ("evaluate", []),
        ("generate", ["DIR", "prompt"]),
    ]
    capsys.readouterr()
    assert commands.main(["statsu"]) == 2
    assert capsys.readouterr().err == (
        f"error: statsu: unknown command; allowed: {', '.join(commands.COMMANDS)}. Did you mean 'status'?\n"
    )
    assert commands.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: starquant COMMAND ...\n  run ")
    assert commands.main(["--version"]) == 0
    assert re.fullmatch(r"starquant \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_hydra_answers_other_words_in_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "job", "method=rtn", "bits=w8a8"]) == 0
    out = capfd.readouterr().out
    assert "name: w8a8" in out
    assert json.dumps("rtn").strip('"') in out


PARTS = (
    "# @package _global_\nexperiment: {name: parted}\nhydra:\n  mode: MULTIRUN\n  sweeper:\n"
    "    params: {bits: 'w4a4,w8a8'}\n"
    "    parts:\n      - {method: 'rtn,gptq'}\n      - {method: 'quarot,quarot_rtn', method.rotation_seed: '0,1'}\n"
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), 2 * (2 + 4)),
        (("bits=w3a3",), 2 + 4),  # the command line wins over every part
        (("method=quarot",), 2 * 2),  # a part takes of a group what it lists, with its own keys
        (("method=rtn,quarot_rtn", "bits=w4a4"), 1 + 2),
        (("method=star_quant", "bits=w4a4"), 1),  # listed by none: without a part's keys
        (("method=awq,quarot", "bits=w4a4"), 1 + 2),
        (("method=quarot", "method.rotation_seed=7", "bits=w4a4"), 1),
    ],
)
def test_parts_of_an_experiment(tmp_path: Path, words: tuple[str, ...], expected: int) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/parted.yaml").write_text(PARTS)
    plan = plan_of([f"--config-dir={tmp_path}", "experiment=parted", *words])
    assert plan is not None and len(plan.cells) == len({cell.key for cell in plan.cells}) == expected
