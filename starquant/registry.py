"""One lazy registry: a name maps to 'module:attribute', imported when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar, cast

from starquant.errors import ConfigError, nearest

Component = TypeVar("Component")


class Registry(Mapping[str, str], Generic[Component]):
    """Names of one kind of component and where each lives.

    Args:
        path: dotted config path that chooses from this registry, named in errors.
        targets: name -> 'module:attribute'.
    """

    def __init__(self, path: str, targets: dict[str, str]) -> None:
        self._path, self._targets = path, dict(targets)

    def add(self, name: str, target: str) -> None:
        """Take in a component of another package; an earlier one of the name gives way."""
        self._targets[name] = target

    def load(self, name: str) -> Component:
        """Import and return the component.

        Raises:
            ConfigError: unknown name; the message lists the allowed ones and the nearest.
        """
        if name not in self._targets:
            raise ConfigError(f"{self._path}: got '{name}', allowed: {', '.join(self)}.{nearest(name, self)}")
        module, _, attribute = self._targets[name].partition(":")
        return cast(Component, getattr(import_module(module), attribute))

    def __getitem__(self, name: str) -> str:
        return self._targets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._targets))

    def __len__(self) -> int:
        return len(self._targets)
