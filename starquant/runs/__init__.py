"""One run, from a validated description to its record."""
