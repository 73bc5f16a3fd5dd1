"""Launch settings that `starquant tune` measured on a GPU of this user's: read beside those that are shipped."""

from __future__ import annotations

import logging
from pathlib import Path

from starquant.errors import ConfigError
from starquant.kernels import tiles
from starquant.store.cache import cache_folder

log = logging.getLogger(__name__)


def tuned_file() -> Path:
    """Return where they lie; raises ConfigError where no cache is known."""
    return cache_folder() / "tiles.json"


def use_tuned() -> None:
    """Let kernels take them; a file that is not one of settings is said and left."""
    try:
        tiles.add(tiles.read_tiles(tuned_file()))
    except (ConfigError, OSError) as error:
        log.warning("launch settings are not read: %s", error)
