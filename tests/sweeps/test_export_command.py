"""`starquant export MODEL DIR` is a run, and names of models stand for checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from starquant.errors import ConfigError
from starquant.packed.completion import main as generate
from starquant.sweeps.command_line import plan_of
from starquant.sweeps.export import main, words_of
from starquant.testbed.folders import checkpoint_of
from starquant.testbed.tiny.shipped import weights_folder


def spec_of(*words: str):
    plan = plan_of([*words])
    assert plan is not None
    return plan.cells[0].spec


def test_an_export_is_a_run_that_scores_no_task_unless_one_is_named() -> None:
    spec = spec_of(*words_of(["tiny", "a b (c)", "bits=w4a8", "method=rtn"]))
    assert (spec.model.name, spec.export.dir, spec.bits.name) == ("tiny", "a b (c)", "w4a8")
    assert spec.tasks.names == ()
    scored = spec_of(*words_of(["method=rtn", "tiny", "tasks.limit=4", "dir"]))
    assert (scored.export.dir, scored.tasks.limit, len(scored.tasks.names)) == ("dir", 4, 4)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["tinny", "DIR"],
            r"^model: got 'tinny', allowed: .*, tiny_sdar\. Did you mean 'tiny'\? \(a checkpoint of your own: ",
        ),
        (["tiny"], r"^export: got tiny; usage: starquant export MODEL DIR"),
        (["tiny", "DIR", "more"], r"^export: got tiny DIR more; usage"),
        (["-m", "tiny", "DIR"], r"^export: got tiny DIR; usage"),
    ],
)
def test_an_export_that_is_none(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        words_of(words)


def test_an_export_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.endswith("usage: starquant export MODEL DIR [KEY=VALUE ...]\n")
    assert main(["tinny", "DIR"]) == 2
    assert capsys.readouterr().err.startswith("error: model: got 'tinny'")


def test_a_test_bed_stands_for_its_checkpoint_wherever_one_is_named(tmp_path: Path) -> None:
    assert checkpoint_of("tiny") == str(weights_folder(0))
    assert checkpoint_of("./tiny") == "./tiny"
    assert spec_of("method=rtn", "model.path=tiny").digest() == spec_of("method=rtn").digest()
    other = spec_of("method=rtn", "model=llada", "model.path=tiny", "tasks.names=[piqa]")
    assert (other.model.path, other.model.testbed, other.model.seed, other.model.name) == (None, "tiny", 0, "llada")
    assert spec_of("method=rtn", "model=llada", "model.path=./tiny", "tasks.names=[piqa]").model.path == "./tiny"


def test_a_test_bed_completes_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(["tiny", "3 + 4 =", "--length", "4"]) == 0
    assert capsys.readouterr().out.strip()
    assert generate(["tiny", "3 + 4 =", "--lenght", "4"]) == 2
    assert capsys.readouterr().err.endswith("Did you mean '--length'?\n")
