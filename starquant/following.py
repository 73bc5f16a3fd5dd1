"""Import one module after another, without importing either now."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, then: str) -> None:
    """Import `then` right after `name`; at once if that is imported already. Does nothing where `then` is under way."""
    if name in sys.modules:
        _follow(then)
    else:
        sys.meta_path.insert(0, _Finder(name, then))


def _follow(then: str) -> None:
    if then not in sys.modules:
        importlib.import_module(then)


class _Finder(MetaPathFinder):
    """Stays until the module is executed: looking for it is not importing it."""

    def __init__(self, name: str, then: str) -> None:
        self.name, self.then, self._asking = name, then, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)
        return spec


class _Then(Loader):
    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _follow(self.finder.then)
