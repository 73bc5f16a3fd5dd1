"""What is imported is declared, what is installed can be imported, and what is cleaned away can be had again."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from starquant import __version__ as PROJECT_VERSION
from starquant import resources
from tests.support.command_line import ENVIRONMENT
from tests.support.paths import PACKAGE, REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: Imported names that are not those of what is installed.
DISTRIBUTIONS = {"PIL": "pillow", "hydra": "hydra-core", "vl_convert": "vl-convert-python", "yaml": "pyyaml"}
DISTRIBUTIONS |= {"llama_cpp": "llama-cpp-python"}
#: Folders whose modules are imported only where an extra is installed, and that extra.
EXTRAS = {"kernels/triton": "triton"}
SOURCES = (*PACKAGE.rglob("*.py"), *(REPOSITORY / "hydra_plugins").rglob("*.py"))
PARTS = (
    *("starquant", "hydra_plugins", "conf", "experiments", "results/paper"),
    *("setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE"),
)
FOLDERS = ("conf", "experiments", "results/paper")
IMPORT_ALL = """
import importlib, pkgutil, sys, hydra_plugins.starquant, starquant
left_out, failed = set(sys.argv[1:]), []
for module in pkgutil.walk_packages(starquant.__path__, "starquant."):
    if not any(module.name.startswith(name) for name in left_out):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            failed.append(f"{module.name}: {error}")
assert "site-packages" in starquant.__file__, starquant.__file__
print(failed)
"""


def names(requirements: list[str]) -> set[str]:
    """Names of distributions, in their one spelling."""
    return {re.split(r"[^A-Za-z0-9._-]", one)[0].lower().replace("_", "-") for one in requirements}


def third_party(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Every package of others that is imported, and whether that happens inside a function."""
    for node in ast.iter_child_nodes(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")):
            yield from third_party(node, inside or isinstance(node, ast.FunctionDef))
        for top in {module.partition(".")[0] for module in modules}:
            if top not in sys.stdlib_module_names and top not in ("starquant", "hydra_plugins"):
                yield DISTRIBUTIONS.get(top, top.replace("_", "-")), inside


CORE = names(PROJECT["dependencies"])
OPTIONAL = {extra: names(wanted) for extra, wanted in PROJECT["optional-dependencies"].items() if extra != "dev"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_import_is_declared(path: Path) -> None:
    extra = next((extra for folder, extra in EXTRAS.items() if path.is_relative_to(PACKAGE / folder)), None)
    with_module = CORE | OPTIONAL.get(extra or "", set())
    for name, inside in third_party(ast.parse(path.read_text(encoding="utf-8"))):
        allowed = CORE.union(*OPTIONAL.values()) if inside else with_module
        assert name in allowed, f"{name} is imported and in no dependency of pyproject.toml"


def test_pins_hold_on_every_python_that_is_allowed() -> None:
    """What has left Python 3.10 is marked: an unmarked pin would leave nothing to install there."""
    oldest = PROJECT["requires-python"].removeprefix(">=")
    judged = 0
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or "==" not in line:  # of a range pip takes what fits
            continue
        pin = Requirement(line)
        try:
            metadata = importlib.metadata.metadata(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if metadata["Version"] not in pin.specifier:
            continue
        allowed = SpecifierSet(metadata["Requires-Python"] or "")
        for python in (oldest, "3.11", "3.12", "3.13"):
            wanted = pin.marker is None or pin.marker.evaluate({"python_version": python})
            assert not wanted or f"{python}.99" in allowed, f"{line}: Python {python} is none of {allowed}"
        judged += 1
    assert judged > 50


def test_nothing_is_declared_for_nothing() -> None:
    imported = {name for path in SOURCES for name, _ in third_party(ast.parse(path.read_text(encoding="utf-8")))}
    assert not CORE - imported


def test_an_undeclared_import_is_seen() -> None:
    code = "import os, psutil\nfrom gguf.x import y\ndef f():\n    import yaml\nif TYPE_CHECKING:\n    import ray"
    assert [*third_party(ast.parse(code))] == [("psutil", False), ("gguf", False), ("pyyaml", True)]


def test_extras_for_development_hold_what_tests_use() -> None:
    imported = {
        name
        for path in (REPOSITORY / "tests").rglob("*.py")
        for name, _ in third_party(ast.parse(path.read_text(encoding="utf-8")))
    }
    unknown = imported - CORE.union(*OPTIONAL.values(), names(PROJECT["optional-dependencies"]["dev"]))
    benchmarks = {path.stem.replace("_", "-") for path in (REPOSITORY / "benchmarks").glob("*.py")}
    assert unknown <= {"tests", "tomli"} | benchmarks


def test_clean_keeps_records(tmp_path: Path) -> None:
    kept = ["README.md", "paper/table1.csv", "published/a/a.json", "records/a.json", "records/a.items/piqa.jsonl"]
    removed = ["tables/a.md", "unfinished/a/piqa.jsonl", "artifacts/a/a.safetensors", "demo/records/a.json"]
    for name in (*kept, *removed):
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / ".venv").mkdir()
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    left = {
        path.relative_to(tmp_path / "results").as_posix() for path in tmp_path.rglob("results/**/*") if path.is_file()
    }
    assert left == {*kept}
    assert not (tmp_path / ".venv").exists()


def test_what_the_package_reads_of_the_top_level_travels_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    read = {*re.findall(r'\bresource\("([^"]+)"\)', code)}
    carried = ast.literal_eval(re.findall(r"^FOLDERS = (.+)$", (REPOSITORY / "setup.py").read_text(), re.MULTILINE)[0])
    assert read and read <= {*carried} == {*FOLDERS}
    assert all(resources.resource(name) == REPOSITORY / name for name in carried)
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    (tmp_path / "conf").mkdir()
    assert resources.resource("conf") == tmp_path / "conf"


def copied(target: Path) -> Path:
    """Copy what a wheel is built of: a build leaves folders beside its source."""
    for part in PARTS:
        path = REPOSITORY / part
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, target / part)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a checkout whose last commit is known."""
    folder = tmp_path_factory.mktemp("wheel")
    source = copied(folder / "source")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=b@c", "commit", "-qm", "d"]):
        subprocess.run(["git", *words], cwd=source, check=True, timeout=60, capture_output=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", "wheels", str(source)]
    subprocess.run(build, cwd=folder, check=True, timeout=300, capture_output=True)
    (path,) = (folder / "wheels").glob("starquant-*.whl")
    return path


@pytest.mark.slow
def test_a_plain_wheel_imports_every_module(wheel: Path, tmp_path: Path) -> None:
    """Installed without extras into an empty environment, from the package index; minutes."""
    environment = tmp_path / "environment"
    run = {"check": True, "capture_output": True, "text": True, "cwd": tmp_path}
    subprocess.run([sys.executable, "-m", "venv", str(environment)], timeout=120, **run)
    python = str(environment / "bin" / "python")
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    constraints = REPOSITORY / "constraints.txt"
    subprocess.run([*pip, "install", "--constraint", str(constraints), str(wheel)], timeout=1800, **run)
    subprocess.run([*pip, "check"], timeout=120, **run)
    left_out = [f"starquant.{folder.replace('/', '.')}" for folder in EXTRAS]
    done = subprocess.run([python, "-I", "-c", IMPORT_ALL, *left_out], timeout=600, **run)
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.slow
def test_an_installed_command_runs_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """The wheel beside the packages of this environment, in whose place a user's would be; a minute."""
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=120)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    install = ["-m", "pip", "--quiet", "install", "--no-deps", "--force-reinstall", str(wheel)]
    subprocess.run([str(environment / "bin" / "python"), *install], check=True, timeout=120, capture_output=True)

    def starquant(*words: str, code: int = 0) -> str:
        command = [str(environment / "bin" / "starquant"), *words]
        done = subprocess.run(command, cwd=empty, capture_output=True, text=True, timeout=400, env=ENVIRONMENT)
        assert done.returncode == code, done.stderr
        return done.stdout

    assert starquant("--version") == f"starquant {PROJECT_VERSION}\n"
    assert not [*empty.iterdir()]
    starquant("run", "method=rtn", "tasks.limit=4")  # the demo, in short
    (record,) = (empty / "results" / "records").glob("tiny-w4a4-rtn-*.json")
    provenance = json.loads(record.read_text())["provenance"]
    assert (provenance["git_dirty"], len(provenance["git_sha"])) == (False, 40)
    assert f"\n{'tiny':16s}" in starquant("models")
    assert "Groups" in starquant("run", "--help")
    starquant("status", "table1_main", "model=tiny", "method=rtn", code=1)
    written = starquant("tables", "table1_main", "--where", "tasks.limit=4").split()
    assert written == [f"results/tables/table1_main{suffix}" for suffix in (".md", ".tex", ".csv")]
    assert "LLaDA-8B" in (empty / "results" / "tables" / "table1_main.md").read_text()  # the paper's figures travel
    assert starquant("report").startswith("results/report.html (")
    assert starquant("generate", "tiny", "3 + 4 =", "--length", "4").strip()
    ours, installed = (
        {path.parent.name for path in folder.glob("experiments/*/README.md")}
        for folder in (REPOSITORY, packages / "starquant")
    )
    assert ours == installed != set()
