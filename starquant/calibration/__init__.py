"""Calibration: text -> segments -> masked states -> streamed statistics, one block resident at a time."""
