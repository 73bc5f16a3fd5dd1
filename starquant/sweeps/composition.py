"""From the words of a cell to the cell: composed by Hydra, validated; cells that differ in plain values share a
composition, as composing takes some ten times as long as validating.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from starquant.sweeps.cells import Cell, plain_of
from starquant.sweeps.overrides import Compose, Groups, diagnose, is_of_configuration

WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,18})")


def varied_keys(overrides: Sequence[Override], groups: Groups) -> frozenset[str]:
    """Return the swept keys whose values can be set in a composed configuration: no group, no part of another key."""
    keys = [override.key_or_group for override in overrides]

    def alone(key: str) -> bool:  # below a group, but no part of another value
        others = [other for other in keys if other not in groups.names or other == key]
        return sum(other == key or other.startswith(f"{key}.") or key.startswith(f"{other}.") for other in others) == 1

    return frozenset(
        o.key_or_group
        for o in overrides
        if o.is_sweep_override()
        and o.get_key_element() == o.key_or_group  # neither added nor put elsewhere
        and o.key_or_group not in groups.names
        and alone(o.key_or_group)
    )


class Composer:
    """Cells from words.

    Args:
        compose: Hydra's composition.
        groups: of the configuration.
        parse: of words.
        varied: keys that may be set in a configuration that is there.
    """

    def __init__(
        self,
        compose: Compose,
        groups: Groups,
        parse: Callable[[Sequence[str]], Iterable[Override]],
        varied: frozenset[str] = frozenset(),
    ) -> None:
        self._compose, self._groups, self._parse, self._varied = compose, groups, parse, varied
        self._plain: dict[tuple[str, ...], dict[str, Any]] = {}
        self._parsed: dict[str, object] = {}
        self.first: DictConfig | None = None

    def cell(self, words: list[str]) -> Cell:
        """Compose and validate one cell.

        Raises:
            CompositionError: an unknown key, whatever else Hydra refuses.
            ConfigError: a value that is not allowed.
        """
        try:
            config = self._config(words)
        except Exception as error:
            if not is_of_configuration(error):
                raise
            raise diagnose(error, words, self._groups, self._compose) from None
        return Cell.of(config)

    def _config(self, words: list[str]) -> dict[str, Any]:
        """Return the configuration of a cell as plain data."""
        varied = [word for word in words if word.partition("=")[0] in self._varied]
        shared = tuple(word for word in words if word not in varied)
        scalars = {word.partition("=")[0]: self._scalar(word) for word in varied}
        plain = self._plain.get(shared)
        if plain is not None and all(_settable(plain, key, scalar) for key, scalar in scalars.items()):
            return _with(plain, scalars)
        config = self._compose(words)
        self.first = self.first or config
        plain = plain_of(config)
        if scalars and plain == plain_of(config, resolve=False):  # no value that follows another
            self._plain[shared] = plain
        return plain

    def _scalar(self, word: str) -> object:
        if word not in self._parsed:
            number = word.partition("=")[2]
            if WHOLE.fullmatch(number):  # of a range: without the grammar, which takes longer than all else
                self._parsed[word] = int(number)
            else:
                (override,) = self._parse([word])
                self._parsed[word] = override.value()
        return self._parsed[word]


def _settable(config: dict[str, Any], key: str, scalar: object) -> bool:
    """Return whether a value that is there is replaced by one that means itself."""
    if isinstance(scalar, dict | list) or (isinstance(scalar, str) and ("${" in scalar or scalar == "???")):
        return False
    here: Any = config
    for part in key.split("."):
        if not isinstance(here, dict) or part not in here:
            return False
        here = here[part]
    return not isinstance(here, dict | list)


def _with(config: dict[str, Any], scalars: dict[str, object]) -> dict[str, Any]:
    """Return a configuration with other values; what is not changed is shared."""
    changed = dict(config)
    for key, scalar in scalars.items():
        *parents, leaf = key.split(".")
        here = changed
        for part in parents:
            here[part] = dict(here[part])
            here = here[part]
        here[leaf] = scalar
    return changed
