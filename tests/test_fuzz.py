"""Whatever a command line, a config.json or a line of data holds: a one-line error or success; no hang, no flood."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.json
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from starquant.calibration.segments import fingerprint, read_segments
from starquant.config.calibration import SourceSpec
from starquant.errors import DataError
from starquant.evaluation.offline import LOCAL_TASKS, validate_data
from starquant.models import load_model
from starquant.runs.preflight import validate_paths
from starquant.sweeps import command_line
from starquant.sweeps.cells import Plan
from tests.support.bounded import bounded, fuzzed, succeeds
from tests.support.paths import FAMILIES, GOLDEN
from tests.support.specs import OPTIONS, compose

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**9, 10**30]),
    st.floats(),
    st.sampled_from([1e308, 1e-320, -0.0, 3e38]),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=12), st.sampled_from(["", " ", "\0", "../x", "nan"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def dotted(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, dotted."""
    for name, value in config.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")


KEYS = sorted({*dotted(compose("model=tiny")), *dotted(compose("model=llada", "method=star_quant"))})
WORDS = (  # one a line: what YAML, Hydra's grammar, numbers, paths and shells take for something else
    "null|true|[]|[1,2]|{}|{a:1}|{a:{b:[1]}}|'a b'|\"x\"|a b|a=b|a,b|(x)|[|{|'|\"|nan|inf|-inf|1e999|-1|0|1000000|"
    "99999999999999999999|1e9|0x10|???|${oops}|${paths}|${oc.env:HOME}|${|choice(1,2)|range(3)|range(0,3,0)|"
    "interval(0,1)|glob(*)|shuffle(1,2)|sort(2,1)|int(3)|tag(a,1)|~|| |\\|\\,|é|\U0001f600|\x7f|a\nb|../../x|"
    "/dev/null|$HOME|*|#"
).split("|")
OPERATORS = st.sampled_from(["", "", "", "+", "++", "~"])
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def _word(operator: str, key: str, value: str) -> str:
    return f"{operator}{key}" if operator == "~" and not value else f"{operator}{key}={value}"


CHOICES = st.sampled_from([f"{group}={option}" for group, options in OPTIONS.items() for option in options])
OVERRIDES = st.builds(
    _word, OPERATORS, st.sampled_from(KEYS), st.one_of(st.sampled_from(WORDS), NUMBERS.map(str), PLAIN)
)
ODD = st.one_of(st.sampled_from(["--cgf", "-x", "--config-dir=nowhere", "-m", "--multirun", "bits", "a.b.c=1"]), PLAIN)


@pytest.fixture(scope="module")
def judged() -> Iterator[None]:
    """A command line that ends where its cells would run; their paths are judged."""

    def run(plan: Plan, *_: object) -> int:
        for cell in plan.cells[:4]:
            validate_paths(cell.spec)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "run", run)
        patch.setattr(command_line, "answer", lambda _: 0)
        yield


COMMANDS = st.lists(st.one_of(OVERRIDES, OVERRIDES, CHOICES, ODD), min_size=1, max_size=3)


@fuzzed(40)
@given(words=COMMANDS)
@example(words=["runtime.threads=1000000"])
@example(words=["-m", "seed=0,1", "method=rtn,quarot"])
def test_command_lines(words: list[str], judged: None) -> None:
    _validate_command(words)


@pytest.mark.parametrize(
    "words",
    [
        ["=1"],
        ["-m", "=1"],
        ["-m", "seed=range(0,1000000)"],
        ["-m", "seed=range(0,1000000000000)"],
        ["-m", "seed=range(0,5000)", "method=rtn,gptq,quarot,awq,none"],
    ],
)
def test_command_lines_that_are_known_to_be_odd(words: list[str], judged: None) -> None:
    _validate_command(words)


def _validate_command(words: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command_line.main(words)
    said = err.getvalue()
    assert code == 0 or (code == 2 and said.startswith("error: ")), (code, said)
    assert "Traceback" not in said
    assert not said or (code == 2 and len(said) < 4000)


LINES = {
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
    "winogrande": {"sentence": "the _ runs", "option1": "a", "option2": "b", "answer": "1"},
    "humaneval": {"task_id": "t", "prompt": "def f():\n", "test": "def check(f): f()", "entry_point": "f"},
    "gsm8k": {"question": "q", "answer": "a #### 1"},
    "hellaswag": {"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "endings": ["a", "b"], "label": "0"},
    "arc_challenge": {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "truthfulqa_mc2": {
        "question": "q",
        "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]},
    },
}


@st.composite
def lines(draw: st.DrawFn, row: dict[str, Any]) -> bytes:
    """A line near a good one: a field changed, added or left out, bytes put in or cut away; or any bytes."""
    item: dict[Any, Any] = dict(row)
    for key in draw(st.lists(st.one_of(st.sampled_from(sorted(row)), st.text(max_size=6)), max_size=2)):
        item[key] = draw(VALUES)
    line = json.dumps(item, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.binary(max_size=4)) + line[at + draw(st.integers(0, 3)) :]
    return line if draw(st.integers(0, 9)) else draw(st.binary(max_size=40))


@fuzzed(200)
@given(data=st.data(), task=st.sampled_from(sorted(LINES)))
def test_lines_of_data(data: st.DataObject, task: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is accepted, the reader that lm-eval's tasks go through reads too."""
    folder, good = tmp_path_factory.mktemp("data"), json.dumps(LINES[task]).encode()
    drawn = data.draw(st.lists(lines(LINES[task]), min_size=1, max_size=3))
    content = b"\n".join([good, *drawn, good])
    for name in LOCAL_TASKS[task].files.values():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(content, 1))
        else:
            path.write_bytes(content)
    if succeeds(lambda: validate_data(folder, [task])):
        pyarrow.json.read_json(io.BytesIO(content), pyarrow.json.ReadOptions(use_threads=False))
    shutil.rmtree(folder)


@fuzzed(150)
@given(data=st.data(), kind=st.sampled_from(["winogrande", "gsm8k", "text"]))
def test_lines_of_calibration(
    data: st.DataObject, kind: str, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any
) -> None:
    folder = tmp_path_factory.mktemp("calibration")
    row = LINES.get(kind, {"text": "1 2 3 4"})
    path = folder / ("text.txt" if data.draw(st.integers(0, 4)) == 0 and kind == "text" else "text.jsonl")
    path.write_bytes(b"\n".join(data.draw(st.lists(lines(row), min_size=1, max_size=3))))
    spec = SourceSpec(kind=kind, path=str(path), segments=1, length=2)
    succeeds(lambda: fingerprint(spec, None))
    succeeds(lambda: read_segments(spec, tiny_tokenizer, 64, seed=0))
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_configurations_of_checkpoints(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / name)
    config = json.loads((GOLDEN / name / "config.json").read_text())
    keys = sorted(config)

    @fuzzed(60)
    @given(changes=st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=2), cut=st.integers(0, 400))
    def load(changes: dict[str, Any], cut: int) -> None:
        text = json.dumps(config | changes)
        (tmp_path / name / "config.json").write_text(text[: None if cut > 40 else cut], errors="surrogatepass")
        succeeds(lambda: load_model(tmp_path / name))

    load()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": []},
        {"vocab_size": {"a": 1}},
        {"n_layers": 10**9, "num_hidden_layers": 10**9},
    ],
)
def test_configurations_that_are_known_to_be_odd(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / name)
    config = json.loads((GOLDEN / name / "config.json").read_text())
    (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
    assert not succeeds(lambda: load_model(tmp_path / name))


def test_the_bounds_bind() -> None:
    with pytest.raises(MemoryError), bounded():
        bytearray(3 << 30)
    with pytest.raises(AssertionError):
        succeeds(lambda: _raise(DataError("two\nlines")))
    with pytest.raises(KeyError):
        succeeds(lambda: _raise(KeyError("a bug")))


def _raise(error: Exception) -> None:
    raise error
