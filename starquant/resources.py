"""Folders of the top level that a wheel carries inside the package: conf/, experiments/, results/paper/."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def resource(name: str) -> Path:
    """Return a folder as it was installed with the package, in a checkout the checkout's own.

    Args:
        name: from the top level, "conf" or "results/paper"; `setup.py` lists what a wheel carries.
    """
    package = Path(str(files("starquant")))
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
