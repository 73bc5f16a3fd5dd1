"""Hydra takes sweepers from this namespace package alone: `hydra/sweeper: starquant` is starquant/sweeps/sweeper.py."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from starquant.sweeps import sweeper


class CellSweeper(sweeper.CellSweeper):
    """The sweeper under the name by which Hydra makes it."""


SETTINGS = {"_target_": f"{__name__}.{CellSweeper.__name__}", "max_batch_size": None, "params": None, "parts": None}
ConfigStore.instance().store(group="hydra/sweeper", name="starquant", node=SETTINGS, provider="starquant")
