"""What docs/extending.md shows is typed out and run: every block becomes its file, or lines of one, in a copy."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from starquant.config.methods import METHODS
from starquant.diffusion import LLaDASampler, MaskPredictor, generate
from starquant.evaluation import suites
from starquant.models import FAMILIES, family_of, load_model, register
from starquant.reports import definitions, experiments, figures
from starquant.reports.__main__ import main as build_tables
from starquant.store.records import read_record
from starquant.store.source import record_paths
from starquant.sweeps import command_line, overrides, status, sweeper
from tests.support.command_line import ENVIRONMENT, run_in_process
from tests.support.models import fresh, logits, trajectory
from tests.support.paths import REPOSITORY
from tests.support.specs import spec
from tests.support.states import states_of

PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
HEADINGS = ["Code", "Registration", "Configuration"]
#: What the examples are fitted on and scored by here.
FEW = ("calibration.source.segments=4", "runtime.threads=1")
PLACE = re.compile(r"(?:# |<!-- )(?P<path>[\w./-]+)(?:, (?P<how>in|above) (?P<where>\w+))?(?: -->)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of the page: a file, or lines that go into one."""

    path: str
    how: str | None
    where: str | None
    text: str

    @classmethod
    def of(cls, fenced: str) -> Block:
        """Read the place off the first line."""
        first, _, text = fenced.partition("\n")
        place = PLACE.fullmatch(first)
        assert place is not None, f"'{first}' names no file"
        return cls(place["path"], place["how"], place["where"], text)

    def write(self, root: Path) -> None:
        """Make the file, or put the lines in front of the first entry of `where`, or above the function `where`."""
        path = root / self.path
        if self.how is None:
            assert not path.exists(), path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.text, encoding="utf-8")
            return
        source = path.read_text(encoding="utf-8")
        lines, end = source.splitlines(keepends=True), "\n\n" if self.how == "above" else ""
        lines.insert(self._line(source) - 1, self.text + end)
        path.write_text("".join(lines), encoding="utf-8")

    def _line(self, source: str) -> int:
        """Where the lines go, counted from 1."""
        if self.path.endswith(".yaml"):
            return source[: source.index(f"\n{self.where}:") + 1].count("\n") + 2
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name == self.where:
                return node.lineno
            if isinstance(node, ast.Assign | ast.AnnAssign) and self.where in ast.unparse(node).split("=")[0]:
                inner = next(n for n in ast.walk(node) if isinstance(n, ast.Dict | ast.DictComp))
                return (inner.keys if isinstance(inner, ast.Dict) else inner.generators[0].iter.elts)[0].lineno
        raise AssertionError(f"{self.path} has no {self.where}")


@dataclass(frozen=True)
class Section:
    """A section of the page: its headings, the blocks that are files, the commands."""

    headings: list[str]
    blocks: list[Block]
    commands: list[list[str]]


def sections() -> dict[str, Section]:
    """The sections of the page by title."""
    titled = re.split(r"^## (.+)\n", PAGE, flags=re.MULTILINE)[1:]
    read = {}
    for title, body in zip(titled[::2], titled[1::2], strict=True):
        fenced = re.findall(r"^```(\w+)\n(.*?)^```", body, re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
        lines = [line for kind, text in fenced if kind == "bash" for line in text.splitlines()]
        commands = [shlex.split(line, comments=True) for line in lines]
        files = [Block.of(text) for kind, text in fenced if kind != "bash"]
        read[title] = Section(re.findall(r"^### (.+)$", prose, re.MULTILINE), files, commands)
    return read


SECTIONS = sections()
METHOD, VARIANT, FAMILY, TASK, REPORT = SECTIONS


def typed(root: Path, *titles: str) -> Path:
    """Copy the checkout without its data and type sections into it."""
    for folder in ("conf", "starquant", "hydra_plugins", "experiments", "tests"):
        shutil.copytree(
            REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "weights", "golden")
        )
    for file in ("run.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / file, root / file)
    (root / "starquant/testbed/tiny/weights").symlink_to(REPOSITORY / "starquant/testbed/tiny/weights")
    (root / "tests/golden").symlink_to(REPOSITORY / "tests/golden")
    for title in titles:
        for block in SECTIONS[title].blocks:
            block.write(root)
    return root


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy with the section that the test names; this process finds its new files and its conf/."""
    root, present = typed(tmp_path / "copy", request.param), set(sys.modules)
    for package in ("config.methods", "methods", "models", "evaluation"):
        module = importlib.import_module(f"starquant.{package}")
        folder = str(root / "starquant" / package.replace(".", "/"))
        monkeypatch.setattr(module, "__path__", [*module.__path__, folder])
    for module in (overrides, sweeper, status, command_line):
        monkeypatch.setattr(module, "CONF", root / "conf")
    monkeypatch.setattr(suites, "TASK_FOLDER", root / "starquant" / "evaluation" / "tasks")
    yield root
    for name in {*sys.modules} - present:
        if str(root) in str(getattr(sys.modules[name], "__file__", None)):
            parent, _, leaf = name.rpartition(".")
            vars(sys.modules.get(parent, sys)).pop(leaf, None)
            del sys.modules[name]


def run_commands(title: str, results: Path, *more: str) -> str:
    """Run a section's `run.py` commands here; returns what they print."""
    printed = ""
    for _, script, *words in SECTIONS[title].commands:
        if script == "run.py":
            done = run_in_process(*words, *more, results=results)
            assert done.returncode == 0, done.stderr
            printed += done.stdout
    return printed


def records(folder: Path) -> dict[str, dict]:
    """The quantized records below a results folder, by method."""
    read = [read_record(path) for path in record_paths(folder)]
    return {one.spec["method"]["name"]: one for one in read if one.spec["method"]["name"] != "none"}


def test_the_page_has_five_sections_of_the_same_three_headings() -> None:
    assert [*SECTIONS] == ["A method", "A variant", "A family", "A task", "A table or figure"]
    for title, section in SECTIONS.items():
        assert section.headings == HEADINGS, title
        assert section.commands, title


@pytest.mark.parametrize("copy", [METHOD], indirect=True)
def test_a_method(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = runpy.run_path(str(copy / "starquant/config/methods/__init__.py"))["METHODS"]
    ((name, code),) = registry._targets.items() - METHODS._targets.items()
    monkeypatch.setitem(METHODS._targets, name, code)
    monkeypatch.setitem(METHODS._options._targets, name, registry._options._targets[name])
    run_commands(METHOD, tmp_path / "results", *FEW)
    record = records(tmp_path / "results")[name]
    assert {entry.weight_bits for entry in record.manifest if entry.kind == "linear"} == {4}
    assert METHODS.options(name)(name=name).model_dump() == record.spec["method"]  # the YAML's defaults
    method, model, reference = METHODS.build(METHODS.options(name)(name=name)), fresh("dream_gqa"), fresh("dream_gqa")
    fitted = method.fit(model, spec("bits=w4a4").bits, states_of(model))
    method.apply(model, fitted, spec("bits=w16a16").bits)
    ids = trajectory(reference)
    exact, rewritten = logits(reference, ids), logits(model, ids)
    assert float((exact - rewritten).norm() / exact.norm()) <= 1e-4
    assert fitted.get("block_000")["qkv_input.scale"].std() > 0.01


@pytest.mark.parametrize("copy", [VARIANT], indirect=True)
def test_a_variant(copy: Path, tmp_path: Path) -> None:
    assert [block.path for block in SECTIONS[VARIANT].blocks] == ["conf/method/quarot_clipped.yaml"]
    run_commands(VARIANT, tmp_path / "results", *FEW)
    method = records(tmp_path / "results")["quarot_clipped"].spec["method"]
    assert (method["algorithm"], method["rotation_seed"], method["weights"]["name"]) == ("quarot", 7, "rtn")


@pytest.mark.parametrize("copy", [FAMILY], indirect=True)
def test_a_family(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = runpy.run_path(str(copy / "starquant/models/families.py"))["FAMILIES"]
    ((name, target),) = registry._targets.items() - FAMILIES._targets.items()
    monkeypatch.setitem(FAMILIES._targets, name, target)
    register(FAMILIES.load(name))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(copy / "make_windowed.py"))
    checkpoint = tmp_path / "windowed-random"
    run_commands(FAMILY, tmp_path / "results", f"model.path={checkpoint}", *FEW)
    scored = {score.task: score.n for score in records(tmp_path / "results")["gptq"].scores}
    assert (scored["testbed_facts"], scored["testbed_arithmetic"]) == (2, 2)
    model = load_model(checkpoint)
    assert family_of(model) is FAMILIES.load(name)
    prompt = torch.tensor([[5, 6, 7, 8]])
    answer = generate(MaskPredictor(model), prompt, LLaDASampler(steps=4, gen_length=4, block_length=4))
    assert answer.shape == (1, 8) and model.mask_token_id not in answer
    ids = torch.arange(80).fmod(50)[None] + 3
    far = ids.clone()
    far[0, -1] = 60  # two blocks of window 32 reach 64 tokens back
    change = (logits(model, ids) - logits(model, far)).abs().amax(-1)[0]
    assert float(change[:15].max()) == 0 < float(change[16:].max())


@pytest.mark.parametrize("copy", [TASK], indirect=True)
def test_a_task(copy: Path, tmp_path: Path) -> None:
    run_commands(TASK, tmp_path / "results", "fidelity=none", *FEW)
    (score,) = records(tmp_path / "results")["rtn"].scores
    assert (score.task, score.metric, score.n) == ("one_step", "acc", 8)


@pytest.mark.parametrize("copy", [REPORT], indirect=True)
def test_a_table_and_a_figure(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = runpy.run_path(str(copy / "starquant/reports/definitions.py"))
    for registry in ("TABLES", "FIGURES"):
        for name in changed[registry].keys() - vars(definitions)[registry].keys():
            monkeypatch.setitem(vars(definitions)[registry], name, changed[registry][name])
    monkeypatch.setattr(experiments, "NAMES", (*definitions.TABLES, *definitions.FIGURES))
    draw = runpy.run_path(str(copy / "starquant/reports/figures.py"))["kl_bars"]
    monkeypatch.setattr(figures, "kl_bars", draw, raising=False)
    results = tmp_path / "results"
    run_commands(REPORT, results, "tasks.names=[testbed_facts]", *FEW)
    *_, tables = SECTIONS[REPORT].commands
    assert build_tables([*tables[tables.index("tables") + 1 :], "--records", str(results)]) == 0
    table = (results / "tables" / "weights_only.md").read_text()
    assert all(f"| {row} |" in table for row in ("full precision", "RTN", "GPTQ"))
    assert (results / "figures" / "weights_only_kl.png").stat().st_size > 1000
    assert (copy / "experiments/weights_only/README.md").exists()


@pytest.mark.slow
def test_everything_in_a_checkout_of_its_own(tmp_path: Path) -> None:
    """All sections typed into one checkout, and its own commands, in processes of their own."""
    root = typed(tmp_path / "copy", *SECTIONS)
    here = ENVIRONMENT | {"PYTHONPATH": str(root)}
    for section in SECTIONS.values():
        for _, *words in section.commands:
            command = [sys.executable, *(str(root / word) if word.endswith("_windowed.py") else word for word in words)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=here, timeout=300)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert (root / "results/tables/weights_only.md").exists()
    assert (root / "results/figures/weights_only_kl.png").exists()
