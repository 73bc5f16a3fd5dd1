"""Measuring which launch settings are fastest on the GPU that is here; `starquant tune` is the command."""
