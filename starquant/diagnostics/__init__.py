"""What activations look like: statistics that explain methods, written as JSON and drawn by `tables.figures`."""
