"""Run records: their schema, atomic writing, and where a number came from."""
