"""starquant: post-training quantization of masked-diffusion LLMs, reproduced and compared.

Importing this package imports nothing heavy; the rooms (`starquant.models`, `starquant.diffusion`, ...)
import torch when they are needed.
"""

__version__ = "0.1.0"
