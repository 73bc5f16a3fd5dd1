"""What catalogues read: composed options, the first sentence of a YAML's header, and how a listing is printed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from starquant.errors import CommandParser
from starquant.reports.text import aligned
from starquant.sweeps.overrides import CONF

#: "(arXiv 2404.00456)", and what stands behind it in the brackets.
PAPER = re.compile(r"\s*\(arXiv [\d.]+(?:[,;] ([^)]*))?\)")
#: Where a sentence ends: a stop before a blank.
END = re.compile(r"\.(?:\s|$)")


def options(group: str) -> list[str]:
    """Return the options of a group that can be chosen."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@contextmanager
def composing() -> Iterator[Callable[[str, Sequence[str]], dict[str, Any]]]:
    """Yield what composes a file of conf/ with overrides, as plain data."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):

        def compose(file: str, words: Sequence[str] = ()) -> dict[str, Any]:
            plain = OmegaConf.to_container(hydra.compose(file, overrides=[*words]), resolve=False)
            assert isinstance(plain, dict)
            return {str(name): value for name, value in plain.items()}

        yield compose


def headline(path: Path) -> str:
    """Return the first sentence of a YAML file's header, without the paper's number."""
    header = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            header.append(line.lstrip("# "))
    text = PAPER.sub(lambda match: f" ({match[1]})" if match[1] else "", " ".join(header))
    return END.split(text, maxsplit=1)[0].removesuffix(".")


def listing(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells below a header, columns flush left, the last one of any length."""
    return "\n".join(line.rstrip() for line in aligned([header, *lines], left=len(header)))


def parse_nothing(command: str, description: str, arguments: Sequence[str] | None) -> None:
    """Parse the words of a command that takes none; raises ConfigError for any."""
    CommandParser(prog=f"starquant {command}", description=description).parse_args(arguments)
