"""Who is told of a finished run. The record on disk is the result; a tracker only shows it."""

from starquant.tracking.tracker import NullTracker, Tracker, make_tracker

__all__ = ["NullTracker", "Tracker", "make_tracker"]
