"""FlatQuant (arXiv 2410.09426)."""
