"""Weights & Biases hears of records and failed runs from a process of its own."""

from starquant.tracking.tracker import WandbTracker, make_tracker

__all__ = ["WandbTracker", "make_tracker"]
