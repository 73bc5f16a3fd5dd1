"""starquant: post-training quantization of masked-diffusion LLMs, reproduced and compared.

Importing this package imports nothing heavy; the rooms (`starquant.models`, `starquant.diffusion`, ...)
import torch when they are needed. Once transformers is imported as well, its Auto classes know the model families and
packed checkpoints: `import starquant; from transformers import AutoModel; AutoModel.from_pretrained(DIR)`.
"""

from starquant.following import when_imported

__version__ = "0.1.0"

when_imported("transformers", then="starquant.packed.plugin")
