"""What pyproject.toml cannot say: folders of the top level, and the commit, travel in the wheel."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
#: Read through starquant/resources.py.
FOLDERS = ("conf", "experiments", "results/paper")
#: Read by starquant/store/provenance.py, where there is no git.
COMMIT = "commit.json"


def git(*arguments: str) -> str | None:
    """Return what git says of this folder; None where this folder is not its repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict[str, str | bool | None]:
    """Return the commit and whether the code differs from it, as provenance has them."""
    if (ROOT / COMMIT).is_file():  # of a source distribution
        return dict(json.loads((ROOT / COMMIT).read_text(encoding="utf-8")))
    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return {"git_sha": None, "git_dirty": None}
    status = git("status", "--porcelain", "--", "starquant", "conf", "run.py")
    return {"git_sha": git("rev-parse", "HEAD"), "git_dirty": None if status is None else bool(status)}


class BuildWithFolders(build_py):
    """Copies the folders into the built package; an editable install reads them where they are."""

    def run(self) -> None:
        """Build the package, then add to it."""
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "starquant"
        for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.is_file()):
            target = package / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(path), str(target))
        (package / COMMIT).write_text(json.dumps(commit()) + "\n", encoding="utf-8")


class SourceWithCommit(sdist):
    """Keeps the commit where there is no git any more."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the source, then add to it."""
        super().make_release_tree(base_dir, files)
        (Path(base_dir) / COMMIT).write_text(json.dumps(commit()) + "\n", encoding="utf-8")


setup(cmdclass={"build_py": BuildWithFolders, "sdist": SourceWithCommit})
