"""Packed checkpoints: written, described, read by transformers, completed from."""
