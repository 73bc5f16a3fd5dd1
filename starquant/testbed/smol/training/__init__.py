"""Training of smol's deltas: documents, packed rows, the network with low-rank updates, the loop and its state."""
