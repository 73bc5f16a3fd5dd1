"""Hydra's reading of configuration files, each of them once."""

from __future__ import annotations

import copy
import os
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType


def read_files_once() -> None:
    """Keep what Hydra reads of a file, until it changes: it parses some thirty of them at every composition."""
    real, kept = ConfigRepository.load_config, dict[tuple[Any, ...], Any]()

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.scheme() not in ("file", "pkg"):
            return real(self, config_path)
        key = source.scheme(), source.path, source.provider, config_path
        if source.scheme() == "file":
            file = os.stat(os.path.join(source.path, source._normalize_file_name(config_path)))
            key += file.st_mtime_ns, file.st_size, file.st_ino
        if key not in kept:
            kept[key] = real(self, config_path)
        return copy.deepcopy(kept[key])

    ConfigRepository.load_config = load_config
