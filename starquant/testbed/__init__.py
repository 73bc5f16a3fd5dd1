"""Models to try methods on: `tiny`, three embedded models of 0.7 M parameters, and `smol`, a real LLM of 135 M."""
