"""What a run is asked to be: validated plain data. No torch."""
