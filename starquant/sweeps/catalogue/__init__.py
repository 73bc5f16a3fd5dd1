"""What there is to choose from, read off conf/ and the registries: a line each, `starquant methods` and its like."""
