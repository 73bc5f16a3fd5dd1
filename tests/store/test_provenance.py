"""The code digest: what can change a score changes it, what cannot does not."""

from __future__ import annotations

import ast
import importlib.util
import shutil
from collections import Counter
from pathlib import Path

import pytest

from starquant.evaluation.offline import LOCAL_TASKS
from starquant.store import provenance
from starquant.store.provenance import DATA, FITTING, INERT, PACKAGE, SCORING, STOCK_TASKS, CodeDigest

TASK = "evaluation/tasks/humaneval/humaneval.yaml"
#: Data files that a digest of code leaves out, and why.
NO_CODE = {
    "kernels/tiles.json": "how products are cut: changes speed only",
    "reports/page/assets/": "how records are shown",
    "testbed/tiny/weights/": "a model's own fingerprint covers them",
    "testbed/smol/deltas/": "the fingerprint of what is built from them covers them",
    "testbed/smol/natural/README.md": "says where the text is from",
    "testbed/smol/LICENSE": "copied beside the weights",
    "testbed/smol/NOTICE": "copied beside the weights",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without its weights, to be changed."""
    copy = tmp_path / "starquant"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    return copy


def digests(package: Path) -> tuple[str, str]:
    code = CodeDigest(package)
    return code.of(FITTING), code.of(SCORING)


def one_file(package: Path, room: str) -> Path:
    root = package / room
    return root if root.is_file() else sorted(root.rglob("*.py"), key=lambda path: path.stat().st_size)[-1]


def described_anew(source: str) -> str:
    """Return the same code in another layout, without its comments, with other docstrings in every place."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node) is not None
            node.body[: int(has_docstring)] = [ast.Expr(ast.Constant("Something else."))]
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n\n# The end.\n"


def test_every_room_is_covered_or_cannot_change_a_score() -> None:
    rooms = {
        path.name
        for path in PACKAGE.iterdir()
        if (path.is_dir() and path.name != "__pycache__")
        or (path.suffix == ".py" and path.name not in ("__init__.py", "__main__.py"))
    }
    assert {*SCORING, *INERT} == rooms
    assert not {*SCORING} & {*INERT}
    assert {*FITTING} <= {*SCORING}
    assert all(INERT.values())


def test_every_data_file_of_the_package_is_covered_or_declared() -> None:
    for path in PACKAGE.rglob("*"):
        name = path.relative_to(PACKAGE).as_posix()
        if path.is_file() and path.suffix not in (".py", ".pyc") and not name.startswith(tuple(NO_CODE)):
            assert any(map(path.match, DATA)) and name.split("/")[0] in SCORING, name


def test_comments_docstrings_and_layout_change_nothing(package: Path) -> None:
    before = digests(package)
    for path in package.rglob("*.py"):
        path.write_text(described_anew(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in package.rglob("*.yaml"):
        path.write_text("# Another comment.\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert digests(package) == before


@pytest.mark.parametrize("room", [*SCORING, *INERT])
def test_any_code_changes_the_digest_of_what_depends_on_it(package: Path, room: str) -> None:
    before = digests(package)
    path = one_file(package, room)
    path.write_text(path.read_text(encoding="utf-8") + "\nANOTHER = 1\n", encoding="utf-8")
    assert tuple(new != old for new, old in zip(digests(package), before, strict=True)) == (
        room in FITTING,
        room in SCORING,
    )


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("max_gen_toks: 1024", "max_gen_toks: 1023", True),
        ("- metric: !function starquant.evaluation.code", "- metric: starquant.evaluation.code", True),
        ('- "\\nclass"', '- "\\nclasses"', True),
        ("max_gen_toks: 1024", 'max_gen_toks: "1024"', True),
        ('name: "create_test"', "name: create_test  # of the answer", False),
        ("k: [1]", "k:\n      - 1", False),
    ],
)
def test_tasks_are_code(package: Path, old: str, new: str, changes: bool) -> None:
    fitting, scoring = digests(package)
    text = (package / TASK).read_text(encoding="utf-8")
    assert old in text
    (package / TASK).write_text(text.replace(old, new), encoding="utf-8")
    assert digests(package)[0] == fitting
    assert (digests(package)[1] != scoring) is changes


def test_items_beside_a_task_are_code(package: Path) -> None:
    items = (package / TASK).parent / "items.jsonl"
    items.write_text('{"question": "1 + 1"}\n')
    (fitting, scoring), _ = digests(package), items.write_text('{"question": "1 + 2"}\n')
    assert digests(package)[0] == fitting
    assert digests(package)[1] != scoring


def test_a_new_file_and_a_new_name_change_the_digest(package: Path) -> None:
    before = digests(package)
    (package / "kernels" / "more.py").write_text("")
    more = digests(package)
    (package / "kernels" / "more.py").rename(package / "kernels" / "most.py")
    assert len({before, more, digests(package)}) == 3


def digest_of_source(folder: Path, source: str) -> str:
    (folder / "room").mkdir(exist_ok=True)
    (folder / "room" / "file.py").write_text(source, encoding="utf-8")
    return CodeDigest(folder).of(("room",))


def test_what_looks_alike_is_told_apart(tmp_path: Path) -> None:
    sources = ["x = 1", "x = 1.0", "x = True", "x = '1'", "x = b'1'", "x = None", "x = y", "x = [1]", "x = (1,)"]
    sources += ["x = {1: 2, **y}", "x = {**y, 1: 2}", "def f(a, /): x", "def f(a): x", "def f(*, a): x"]
    sources += [
        "if x:\n f()\ng()",
        "if x:\n f()\n g()",
        "f'{x!r}'.y",
        "f'{x}'.y",
        "from . import x",
        "from .. import x",
    ]
    assert len({digest_of_source(tmp_path, source) for source in sources}) == len(sources)


def test_statements_that_do_nothing_are_alike(tmp_path: Path) -> None:
    bodies = ['"""Do it."""', '"""Do it."""\n    pass', "pass", "...", "# nothing\n    ..."]
    assert len({digest_of_source(tmp_path, f"def f(a: int = 1):\n    {body}") for body in bodies}) == 1


def test_the_digest_is_the_same_under_every_python(tmp_path: Path) -> None:
    source = (
        "from x import y as z\n"
        "class A(B, c=1):\n    '''Doc.'''\n    d: int = -1\n"
        "    @z\n    async def e(self, *f: int, g=2, **h) -> None:\n        return f'{g!r:>9} '\n"
        "def i(j):\n    match j:\n        case [1, *_]:\n            return lambda k: {**k}\n"
        "        case None:\n            pass\n"
    )
    assert digest_of_source(tmp_path, source) == "9ca6d8b31b5eb9d5"


def test_each_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[Path] = Counter()
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        reads[path] += 1
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    code = CodeDigest()
    assert code.of(FITTING) != code.of(SCORING) == code.of(SCORING)
    assert PACKAGE / "kernels" / "dispatch.py" in reads
    assert PACKAGE / TASK in reads
    assert set(reads.values()) == {1}


@pytest.fixture
def harness(tmp_path: Path) -> Path:
    """A folder laid out as lm-eval's."""
    for name in ("evaluator.py", "api/metrics.py", "tasks/manager.py", "tasks/other/other.yaml", "README.md"):
        (tmp_path / "lm_eval" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lm_eval" / name).write_text("a: 1\n")
    for name in STOCK_TASKS:
        folder = tmp_path / "lm_eval" / "tasks" / name
        folder.mkdir(parents=True)
        for file in ("task.yaml", "utils.py", "_default_template_yaml"):
            (folder / file).write_text("a: 1\n")
    return tmp_path / "lm_eval"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(("evaluator.py", True), ("api/metrics.py", True), ("tasks/manager.py", True)),
        *(("tasks/gsm8k/task.yaml", True), ("tasks/hellaswag/utils.py", True), ("tasks/arc/task.yaml", True)),
        *(("tasks/mmlu/default/_default_template_yaml", True), ("README.md", False)),
        ("tasks/other/other.yaml", False),  # its version stands for it
    ],
)
def test_the_definitions_of_stock_tasks_are_code(harness: Path, name: str, changes: bool) -> None:
    (harness.parent / "evaluation").mkdir()

    def digests() -> tuple[str, str]:
        code = CodeDigest(harness.parent, harness)
        return code.of(("calibration",)), code.of(("evaluation",))

    fitting, scoring = digests()
    (harness / name).write_text("a: 2\n")
    assert digests()[0] == fitting
    assert (digests()[1] != scoring) is changes


def test_the_version_of_lm_eval_is_code(monkeypatch: pytest.MonkeyPatch) -> None:
    scoring = CodeDigest().of(SCORING)
    monkeypatch.setattr(provenance, "version", lambda name: "0.0.1")
    assert CodeDigest().of(SCORING) != scoring


def test_the_installed_lm_eval_has_the_stock_tasks() -> None:
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    assert all(any((folder / name).glob("*.yaml")) for name in STOCK_TASKS)
    stock = {Path(task.stock).parent.as_posix() for task in LOCAL_TASKS.values() if task.stock}
    assert stock <= {*STOCK_TASKS}
