"""Words and files that Hydra cannot read: one line with the key or the file, and how a value is quoted."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from starquant.errors import ConfigError
from starquant.sweeps import command_line
from starquant.sweeps.command_line import main, plan_of
from tests.support.sweeps import Runner, done


def refusal(*words: str) -> str:
    """Return the one line of a command line that is refused."""
    with pytest.raises(ConfigError) as caught:
        plan_of(["method=rtn", *words])
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


TEXTS = ["/tmp/a=b", "/tmp/a(b", "/tmp/a)b", "~/x", "a=b,(c d", "é", "it's", 'a"b', "a;b", "#1", "a&b", "!x"]


@pytest.mark.parametrize("text", TEXTS)
def test_an_unquoted_value_is_told_how_to_be_quoted(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the message says to type is what a shell makes the text itself of."""
    monkeypatch.setenv("HOME", "/home/mine")
    for sweep in ((), ("-m", "seed=0,1")):
        line = refusal(f"paths.results={text}", *sweep)
        assert line.startswith(f"paths.results: got {text}, unquoted (")
        (word,) = shlex.split(line.rpartition("; quote it: ")[2])
        plan = plan_of(["method=rtn", word, *sweep])
        assert plan is not None
        assert {cell.spec.paths.results for cell in plan.cells} == {os.path.expanduser(text)}


@pytest.mark.parametrize("text", ["a,b", "a b,c"])
def test_a_comma_makes_several_values(text: str) -> None:
    line = refusal(f"paths.results={text}")
    assert line.startswith(f"paths.results: got several values, paths.results={text}; add -m to run a sweep, or quote")
    (word,) = shlex.split(line.rpartition(", or quote it: ")[2])
    plan = plan_of(["method=rtn", word])
    assert plan is not None and plan.cells[0].spec.paths.results == text
    assert "a name with a comma is quoted" in refusal("-m", f"paths.results={text}")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("tasks.names=[testbed_facts", "tasks.names: got [testbed_facts, which is not a list, an object or a quoted"),
        ("runtime={threads: 1", "runtime: got {threads: 1, which is not a list, an object or a quoted text to its end"),
        ('model.path="x', 'model.path: got "x, which is not a list, an object or a quoted text to its end'),
        ("a b=3", "a b=3: not an override ("),
        ("seed=" + "9" * 5000, "seed: got 9999"),
        ("seed=" + "[" * 2000, "seed: got [[[["),
        ("seed=\x00", "'seed=\\x00': allowed: one line of UTF-8 text"),
        ("model.name=a\nb", "'model.name=a\\nb': allowed: one line of UTF-8 text"),
        ("paths.results=\udcff", "'paths.results=\\udcff': allowed: one line of UTF-8 text"),
        ("seed=${nothing}", "seed: Interpolation key 'nothing' not found"),
        ("paths=3", "paths: got 3, allowed: an object"),
        ("hydra.mode=FOO", "Error merging override hydra.mode=FOO: hydra.mode: Invalid value 'FOO'"),
        ("hydra.run=3", "Error merging override hydra.run=3: hydra.run: Invalid type assigned: int"),
        ("hydra=3", "Config group override must be a string or a list. Got int"),
        ("hydra.searchpath=3", "hydra.searchpath must be a list of strings. Got: 3"),
        ("hydra.searchpath=[file:///no/where]", "provider=hydra.searchpath in command-line, path=/no/where is not"),
        ("--config-dir=/no/where", "--config-dir: /no/where: no such folder"),
        ("--config-dir=", "--config-dir: "),
    ],
)
def test_other_words_are_one_line(word: str, line: str) -> None:
    said = refusal(word)
    assert said.startswith(line)
    assert len(said) < 600


BITS = "name: mine\nweights: {bits: 4}\nactivations: {bits: 4}\n"


BROKEN = [
    (b"name: [w4\nweights: {", "FILE, line 2: not valid YAML: expected ',' or ']'"),
    (b"name: x\n\tweights: 1\n", "FILE, line 2: not valid YAML: found character '\\t'"),
    (b"name: \xff\n", "FILE: not UTF-8 (invalid start byte)"),
    (b"- 1\n", "bits: got [1], allowed: an object"),
    (b"name: a\nname: b\n", "FILE, line 2: not valid YAML: found duplicate key name"),
    (b"a: !!python/object/apply:os.system [x]", "FILE, line 1: not valid YAML: could not determine a constructor"),
    (b"name: ${no.thing}\n", "bits.name: Interpolation key 'no.thing' not found"),
    (b"name: ${bits.name}\n", "bits.name: "),
    (b"defaults: [nope]\n", "In 'bits/mine': Could not load 'bits/nope'."),
    (b"defaults: 3\n", "Invalid defaults list in 'bits/mine', defaults must be a list (got int)"),
    (BITS.replace("mine", "../mine").encode(), "bits.name: got '../mine', allowed: at most 48 letters"),
]
SWEEP = ("-m", "seed=0,1")
#: In a sweep as well: one that is no YAML, no UTF-8, no composition, no bits.
SWEPT = [(text, line, SWEEP, i in (0, 2, 6, 10)) for i, (text, line) in enumerate(BROKEN)]


@pytest.mark.parametrize(
    ("text", "line", "sweep"),
    [
        *((text, line, ()) for text, line in BROKEN),
        *(pytest.param(*case, marks=() if usual else pytest.mark.slow) for *case, usual in SWEPT),
    ],
)
def test_broken_yaml_is_named(text: bytes, line: str, sweep: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "it's, mine (1)"
    (folder / "bits").mkdir(parents=True)
    file = folder / "bits" / "mine.yaml"
    file.write_text(BITS)
    words = [f"--config-dir={folder}", "bits=mine", *sweep]
    assert plan_of(["method=rtn", *words]) is not None
    file.write_bytes(text)
    assert refusal(*words).startswith(line.replace("FILE", str(file)))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{params: 3}", "hydra.sweeper.params: got 3, allowed: KEY: VALUES"),
        ("{params: {seed: 'a,(b'}}", "seed: got a,(b, unquoted ("),
        ("{parts: {a: 1}}", "hydra.sweeper.parts: got {'a': 1}, allowed: a list of KEY: VALUES"),
        ("{parts: [3]}", "hydra.sweeper.parts: got [3], allowed: a list of KEY: VALUES"),
        ("{max_batch_size: -1}", "hydra.sweeper.max_batch_size: got -1, allowed: null, or a whole number from 1"),
    ],
)
def test_a_sweeper_of_an_experiment_is_judged(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text(f"# @package _global_\nexperiment: {{name: mine}}\nhydra: {{mode: MULTIRUN, sweeper: {text}}}\n")
    assert refusal(f"--config-dir={tmp_path}", "experiment=mine").startswith(line)


def test_results_of_any_name_serve_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "CellRunner", lambda: Runner(done))
    for name in ("a=b,c", "a(b) é", "it\\'s $x#"):
        assert main(["-m", "method=rtn", "seed=0,1", f"paths.results='{tmp_path}/{name}'"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a=b,c", "a(b) é", "it's $x#"}
    assert all((path / "sweeps").is_dir() and (path / "records").is_dir() for path in tmp_path.iterdir())
