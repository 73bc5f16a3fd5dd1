"""From the words of a cell to the cell: composed by Hydra, validated.

Composing takes some ten times as long as validating. Cells that differ in plain values share a composition, and where
groups are swept whose options write below their group only, each option is composed once, not each combination.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from starquant.sweeps.cells import Cell, plain_of
from starquant.sweeps.overrides import WORD, Compose, Groups, diagnose, is_of_configuration, options_of

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


def contained_groups(overrides: Sequence[Override], groups: Groups) -> frozenset[str]:
    """Return the swept groups all of whose options write below their group only."""
    swept = [o for o in overrides if o.is_sweep_override() and o.get_key_element() == o.key_or_group in groups.names]
    keys = [override.key_or_group for override in overrides]
    return frozenset(
        override.key_or_group
        for override in swept
        if keys.count(override.key_or_group) == 1
        and all(
            WORD.fullmatch(option) and groups.is_contained(override.key_or_group, option)
            for option in options_of(override)
        )
    )


class Composer:
    """Cells from words.

    Args:
        compose: Hydra's composition.
        groups: of the configuration.
        parse: of words.
        varied: keys that may be set in a configuration that is there.
        contained: groups whose options may be exchanged in one.
    """

    def __init__(
        self,
        compose: Compose,
        groups: Groups,
        parse: Callable[[Sequence[str]], Iterable[Override]],
        varied: frozenset[str] = frozenset(),
        contained: frozenset[str] = frozenset(),
    ) -> None:
        self._compose, self._groups, self._parse, self._varied = compose, groups, parse, varied
        self._contained = contained
        self._plain: dict[tuple[str, ...], dict[str, Any]] = {}
        self._bases: dict[tuple[str, ...], tuple[str, ...]] = {}
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
        scalars = {word.partition("=")[0]: self._scalar(word) for word in words if self._is_of(word, self._varied)}
        shared = tuple(word for word in words if not self._is_of(word, self._varied))
        if shared not in self._plain:
            exchanged = self._exchanged(shared, [word for word in words if word not in shared])
            if exchanged is not None:
                self._plain[shared] = exchanged
        plain = self._plain.get(shared)
        if plain is not None and all(_settable(plain, key, scalar) for key, scalar in scalars.items()):
            return _with(plain, scalars)
        return self._composed(words, shared)

    @staticmethod
    def _is_of(word: str, keys: frozenset[str]) -> bool:
        return word.partition("=")[0] in keys

    def _composed(self, words: Sequence[str], shared: tuple[str, ...]) -> dict[str, Any]:
        """Return what Hydra composes, kept where no value follows another."""
        config = self._compose([*words])
        self.first = self.first or config
        plain = plain_of(config)
        if (self._varied or self._contained) and plain == plain_of(config, resolve=False):
            self._plain[shared] = plain
            self._bases.setdefault(self._rest(shared), shared)
        return plain

    def _rest(self, shared: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(word for word in shared if not self._is_of(word, self._contained))

    def _exchanged(self, shared: tuple[str, ...], varied: list[str]) -> dict[str, Any] | None:
        """Return a configuration whose groups are taken from compositions that differ in one of them from another.

        None where there is nothing to save, or a group has written elsewhere.
        """
        first = self._bases.get(self._rest(shared))
        if first is None or len(first) != len(shared):
            return None
        places = [place for place, word in enumerate(shared) if word != first[place]]
        if len(places) < 2:
            return None
        base = dict(self._plain[first])
        for place in places:
            group = shared[place].partition("=")[0]
            other = (*first[:place], shared[place], *first[place + 1 :])
            if other not in self._plain:
                self._composed([*other, *varied], other)
            plain = self._plain.get(other)
            if plain is None or group not in plain or not self._differ_in(group, plain, self._plain[first]):
                return None
            base[group] = plain[group]
        return base

    def _differ_in(self, group: str, a: dict[str, Any], b: dict[str, Any]) -> bool:
        """Return whether two configurations are one but for a group and what may be set in it."""
        keys = {key.split(".")[0] for key in self._varied} | {group}
        return {k: v for k, v in a.items() if k not in keys} == {k: v for k, v in b.items() if k not in keys}

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
