"""Every cell of a sweep is judged before the first one runs: completely, quickly, and once a fault."""

from __future__ import annotations

import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from starquant.runs import judgement
from starquant.sweeps import command_line, sweeper
from starquant.sweeps.command_line import main, plan_of
from starquant.sweeps.composition import Composer
from starquant.sweeps.faults import MOST
from starquant.sweeps.running import validate_cells
from tests.support.paths import GOLDEN
from tests.support.sweeps import Runner, done

CONTEXT = "at most the model's context of 256 tokens"


def refused(results: Path, *words: str) -> None:
    """Run a sweep that is refused before anything is run or written."""
    cells: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "CellRunner", lambda: Runner(lambda cell: cells.append(cell)))
        assert main(["-m", *words, f"paths.results={results}"]) == 2
    assert cells == []
    assert not results.exists()


@pytest.mark.parametrize(
    ("words", "faults"),
    [
        (("model.seed=0,9",), ["model.seed: got 9, allowed: 0, 1, 2 (the embedded models that are shipped)"]),
        (("model.seed=0,9,8", "seed=range(0,4)"), ["model.seed: got 9, * (4 cells)", "model.seed: got 8, * (4 cells)"]),
        (("model.seed=null", "model.path=/no,/where", "seed=0,1,2"), ["model.path: /no: * (3 cells)", "*/where: *"]),
        (("bits.weights.group_size=32,100",), ["bits.weights.group_size: got 100, which does not divide *"]),
        (("runtime.device=tpu9,cpu",), ["runtime.device: 'tpu9' cannot be used here: *"]),
        (("tasks.data_dir=/no",), ["tasks.data_dir: /no: no such folder"]),
        (("method=gptq", "calibration.source.length=64,999"), [f"calibration.source.length: got 999, *{CONTEXT}"]),
        (
            ("method=gptq", "calibration=text", "calibration.source.path=TEXT", "calibration.source.segments=1,999"),
            ["calibration.source.segments: got 999, but *"],
        ),
        (
            ("method=gptq", "calibration=testbed,text", "calibration.source.path=/no.txt"),
            ["calibration.source.path: got '/no.txt', allowed: null for kind 'testbed', *", "*/no.txt: no such file"],
        ),
        (("method=rtn,packed",), ["method: got packed, but * is not packed; *"]),
        (
            ("method=gptq", "calibration.states.sampler=uniform,trajectory", "calibration.states.per_segment=9"),
            ["*at most the trajectory's 8*"],
        ),
        (("seed=-1,0,abc", "bits=w4a4,w8a8"), ["seed: got -1, * (2 cells)", "seed: got 'abc', * (2 cells)"]),
        (("seed=0,1", "foo=3"), ["foo: unknown key; *"]),
        (("model.name=tiny,../x",), ["model.name: got '../x', *"]),
        (("runtime.threads=1,1000000",), ["runtime.threads: got 1000000, allowed: less than or equal to 1024"]),
    ],
)
def test_a_fault_of_any_cell_is_a_line_before_the_first_one_runs(
    words: tuple[str, ...], faults: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one two three " * 200)
    words = tuple(word.replace("TEXT", str(tmp_path / "a.txt")) for word in words)
    method = () if any(word.startswith("method=") for word in words) else ("method=rtn",)
    refused(tmp_path / "r", "fidelity=none", *method, *words)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(faults), lines
    for line, fault in zip(lines, faults, strict=True):
        assert fnmatchcase(line, "error: " + fault.replace("[", "[[]")), line


def test_of_thousands_of_faults_the_first_ones_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path / "r", "method=rtn", "seed=range(-50,50)")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == MOST + 1
    assert lines[-1] == "error: and 40 more faults of this sweep"


def test_what_cells_share_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    for name in ("validate_checkpoint", "validate_device", "_validate_method", "read_texts"):
        original = getattr(judgement, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            looks.append(name)
            return original(*args)

        monkeypatch.setattr(judgement, name, counted)
    plan = plan_of(["-m", "method=rtn,gptq", "seed=range(0,10)", "model.seed=0,1", "fidelity=none"])
    assert plan is not None and len(plan.cells) == 40
    validate_cells(plan)
    counts = {name: looks.count(name) for name in looks}
    assert counts == {"validate_device": 1, "validate_checkpoint": 2, "_validate_method": 4, "read_texts": 2}


def test_a_sweep_for_other_machines_is_judged_but_for_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    looks: list[str] = []
    monkeypatch.setattr(judgement, "validate_device", lambda device: looks.append(device))
    plan = plan_of(["-m", "method=rtn", "seed=0,1", "runtime.device=cuda", "launcher=joblib"])
    assert plan is not None
    validate_cells(plan)
    assert looks == []


def test_another_checkpoint_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    both = f"{GOLDEN / 'llada_mha'},{tmp_path / 'empty'}"
    refused(tmp_path / "r", "model=llada", f"model.path={both}", "method=rtn", "tasks=fidelity", "fidelity=testbed")
    err = capsys.readouterr().err
    assert f"{tmp_path / 'empty'}" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [
        ("method=rtn", "seed=range(0,1000)"),
        (
            "method=star_quant",
            "seed=range(0,20)",
            "method.tac.block_size=4,8,16,32,64",
            "method.transform.steps=range(1,11)",
        ),
    ],
)
def test_a_cell_takes_two_milliseconds(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 of them under ten seconds, with all else that a command does; plain values share one composition."""
    composed: list[object] = []
    original = Composer.__init__

    def counted(self: Composer, compose: Any, *args: Any, **kwargs: Any) -> None:
        original(self, lambda words: composed.append(words) or compose(words), *args, **kwargs)

    monkeypatch.setattr(Composer, "__init__", counted)
    began = time.process_time()
    plan = plan_of(["-m", *words])
    assert plan is not None and len(plan.cells) == 1000
    validate_cells(plan)
    assert time.process_time() - began < 2.0 + 1.5  # composing, checkpoint and texts, once
    assert len(composed) == 1


def test_a_good_sweep_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "CellRunner", lambda: Runner(done))
    assert main(["-m", "method=rtn", "model.seed=0,1", f"paths.results={tmp_path}"]) == 0


def composed(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[list[Any], list[Any], int, int]:
    """Cells of a sweep, as they are and with each combination composed by Hydra; and how often Hydra composes."""
    calls: list[int] = []
    real = Composer._composed
    monkeypatch.setattr(Composer, "_composed", lambda *args: calls.append(1) or real(*args))
    ours = plan_of(["-m", *words])
    fewer = len(calls)
    monkeypatch.setattr(sweeper, "contained_groups", lambda *_: frozenset())
    theirs = plan_of(["-m", *words])
    assert ours is not None and theirs is not None
    return [c.spec for c in ours.cells], [c.spec for c in theirs.cells], fewer, len(calls) - fewer


def test_each_option_is_composed_once_not_each_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("method=gptq,quarot,star_quant", "bits=w3a3,w4a8,w8a8", "seed=0,1", "bits.head=8")
    ours, theirs, fewer, all_of_them = composed(monkeypatch, *words)
    assert ours == theirs and len(ours) == 18
    assert (fewer, all_of_them) == (5, 9)


@pytest.mark.parametrize(
    "words",
    [
        ("model=tiny,smol", "method=rtn,gptq", "calibration=testbed,smol"),  # a model chooses its calibration
        ("method=rtn,gptq", "method.name=a,b", "bits=w4a4,w8a8"),  # a value of a group, swept as well
        ("method=rtn,gptq", "bits=w4a4,w8a8", "bits.weights.clip_ratio=${bits.activations.clip_ratio}"),
    ],
)
def test_groups_that_write_elsewhere_are_composed_as_they_are(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, _, _ = composed(monkeypatch, *words)
    assert ours == theirs and len(ours) >= 4
