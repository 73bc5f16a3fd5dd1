"""From the words of a cell to the cell: composed by Hydra, validated; cells that differ in plain values share a
composition, as composing takes some ten times as long as validating.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from starquant.sweeps.cells import Cell
from starquant.sweeps.overrides import Compose, Groups, diagnose


def varied_keys(overrides: Sequence[Override], groups: Groups) -> frozenset[str]:
    """Return the swept keys whose values can be set in a composed configuration: no group, no part of another key."""
    keys = [override.key_or_group for override in overrides]

    def alone(key: str) -> bool:
        return sum(other == key or other.startswith(f"{key}.") or key.startswith(f"{other}.") for other in keys) == 1

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
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._parsed: dict[str, object] = {}
        self.first: DictConfig | None = None

    def cell(self, words: list[str]) -> Cell:
        """Compose and validate one cell.

        Raises:
            ConfigError: an unknown key, a value that is not allowed, whatever else Hydra refuses.
        """
        try:
            return Cell.of(self._config(words))
        except (HydraException, OmegaConfBaseException) as error:
            raise diagnose(error, words, self._groups, self._compose) from None

    def _config(self, words: list[str]) -> DictConfig:
        """Return the configuration of a cell, good until the next call."""
        varied = [word for word in words if word.partition("=")[0] in self._varied]
        shared = tuple(word for word in words if word not in varied)
        scalars = {word.partition("=")[0]: self._scalar(word) for word in varied}
        config = self._composed.get(shared)
        if config is None or not all(_settable(config, key, scalar) for key, scalar in scalars.items()):
            config = self._compose(words)
            if scalars:
                self._composed[shared] = config
            if self.first is None:
                self.first = copy.deepcopy(config) if scalars else config
        else:
            for key, scalar in scalars.items():
                OmegaConf.update(config, key, scalar, merge=True)  # as Hydra applies an override
        return config

    def _scalar(self, word: str) -> object:
        if word not in self._parsed:
            (override,) = self._parse([word])
            self._parsed[word] = override.value()
        return self._parsed[word]


def _settable(config: DictConfig, key: str, scalar: object) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return (
        isinstance(node, DictConfig)
        and name in node
        and not OmegaConf.is_config(node[name])
        and not isinstance(scalar, (dict, list))
    )
