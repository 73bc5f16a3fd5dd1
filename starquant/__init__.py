"""starquant: post-training quantization of masked-diffusion LLMs, reproduced and compared.

Importing this package imports nothing heavy; the rooms (`starquant.models`, `starquant.diffusion`, ...) import torch
when they are needed. `import starquant.packed` lets transformers' Auto classes know the model families and packed
checkpoints.
"""

__version__ = "0.1.0"
