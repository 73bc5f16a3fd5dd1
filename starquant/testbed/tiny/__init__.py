"""The embedded model: a small LLaDA-architecture model with its own tokenizer, data and tasks.

`world` (facts), `arithmetic` and `programs` generate items; `train` trains the shipped weights. Everything is seeded
and needs no network.
"""
