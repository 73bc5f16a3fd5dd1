"""Commands that pages show, as typed: those of a page in their order, in one folder.

What a command needs that a test does not have is read off its words (`NEEDS`): it is skipped by that name. Words of
runs are validated whatever they need. What starts no model runs in every test, the rest in the slow ones.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from starquant.sweeps.command_line import plan_of
from tests.support.command_line import ENVIRONMENT
from tests.support.paths import REPOSITORY

PAGES = [
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "experiments/*/README.md")
    for path in sorted(REPOSITORY.glob(pattern))
    if path.name not in ("log.md", "extending.md")  # history; tests/test_extending.py
]
#: What a command needs -> words that say so. The first that fits is the reason.
NEEDS = {
    "an environment of its own": r"^(make|pip) |-m pytest",
    "llama.cpp's own programs": r"^llama-",
    "a GPU": r"device[= ]cuda|--multi_gpu",
    "a cluster or several processes": r"launcher=slurm|torch\.distributed",
    "something of the reader's own": r"\b[A-Z]\.json|[=/ ](DATA|DIR|NAME)\b|corpus\.txt|/checkpoints/|limit=64|--watch",
    "weights of 8B": r"\b(model=|true_size\.py |generate )(llada|dream)(?!.*--cfg)",
    "`make smol`": r"model=smol|experiment=(smol_\w+|plus_ablation)",
    "hours": r"experiment=|-m .*(model|rotation)_?\.?seed=",
    "records of an experiment": r"starquant tables (?!.*--records)|reports\.efficiency|across_seeds results/records",
}
#: What starts no model and reads no records.
QUICK = re.compile(r"starquant (methods|models|tasks|status|completion)\b|--cfg ")


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks for a shell, continued ones as one; with what they assign before them."""
    lines, assigned = [], ""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if len(words) == 1 and re.match(r"[A-Z]=", line):
                assigned += f"{line}\n"
            elif words:
                lines.append(assigned + line)
    return lines


def bare(command: str) -> str:
    """A command without assignments before it and the comment behind it."""
    return command.splitlines()[-1].partition("  #")[0].rstrip()


def need(command: str) -> str | None:
    """What a command needs that is not here."""
    line = bare(command)
    return next((name for name, words in NEEDS.items() if re.search(words, line)), None)


def run_words(command: str) -> list[str] | None:
    """The overrides of a command that runs something, None of another one."""
    assigned, line = command.splitlines()[:-1], bare(command)
    for name, value in (one.split("=", 1) for one in assigned):
        line = line.replace(f"${name}", value)
    match = re.search(r"(?:run\.py|starquant run)(?= |$)(.*)", line)
    return None if match is None or "--cfg" in line else shlex.split(match[1], comments=True)


RUNS = sorted({tuple(words) for page in PAGES for line in commands(page) if (words := run_words(line)) is not None})
SWEEP = re.compile("-m|experiment=.*")


@pytest.mark.parametrize(
    "words",
    [pytest.param(w, id=" ".join(w), marks=[pytest.mark.slow] if any(map(SWEEP.fullmatch, w)) else []) for w in RUNS],
)
def test_every_run_that_a_page_shows_is_one(words: tuple[str, ...]) -> None:
    assert plan_of(list(words)) is not None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout where nothing has run."""
    for name in ("run.py", "starquant", "conf", "experiments", "benchmarks", "hydra_plugins", "pyproject.toml"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "results").mkdir()
    for name in ("paper", "published"):
        (tmp_path / "results" / name).symlink_to(REPOSITORY / "results" / name)
    return tmp_path


def type_in(folder: Path, command: str) -> None:
    path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=ENVIRONMENT | more,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    fine = (0, 1) if " status " in command else (0,)  # 1: cells are missing
    assert done.returncode in fine, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", ["README.md", "docs/quick-start.md"])
def test_quick_commands_run_as_typed(page: str, folder: Path) -> None:
    for command in dict.fromkeys(map(bare, commands(REPOSITORY / page))):
        if QUICK.search(command) and need(command) is None:
            type_in(folder, command)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_commands_run_as_typed(page: Path, folder: Path) -> None:
    skipped = {command: reason for command in commands(page) if (reason := need(command)) is not None}
    for command in commands(page):
        if command not in skipped:
            type_in(folder, command)
    if skipped:
        pytest.skip("; ".join(f"{bare(command)}: {why}" for command, why in skipped.items()))


def test_a_command_that_does_not_exist_is_seen(folder: Path) -> None:
    with pytest.raises(AssertionError, match="methodds: unknown command"):
        type_in(folder, "starquant methodds")
