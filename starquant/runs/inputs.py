"""A run's inputs: pinned by content, and the checkpoint in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.models import load_model, load_tokenizer, resolve_folder
from starquant.models.base import MaskedDiffusionModel
from starquant.models.checkpoint import fingerprint
from starquant.models.loading import validate_checkpoint
from starquant.models.validation import skeleton_of
from starquant.runs.packed import with_bits_of
from starquant.runs.stages import Texts, pin_sources, read_texts
from starquant.testbed.shipped import weights_folder


@dataclass
class Loaded:
    """The checkpoint in memory, read once for the full-precision and the quantized run."""

    folder: Path
    spec: RunSpec
    device: str
    tokenizer: PreTrainedTokenizerBase
    texts: Texts
    packed: bool = False
    seconds: float = 0.0
    model: MaskedDiffusionModel | None = field(default=None)

    @classmethod
    def prepare(cls, folder: Path, spec: RunSpec, device: str) -> Loaded:
        """Read everything but the weights, so that bad text is found before anything is computed.

        Raises:
            StarquantError: a method that does not fit the model, text that cannot be used.
        """
        checkpoint, family = validate_checkpoint(folder)
        tokenizer = load_tokenizer(folder)
        skeleton = skeleton_of(checkpoint, family.model)
        METHODS.build(spec.method).validate(skeleton, spec.bits)
        packed = "quantization_config" in checkpoint.config
        return cls(folder, spec, device, tokenizer, read_texts(spec, tokenizer, skeleton), packed)

    def get(self) -> MaskedDiffusionModel:
        """Return the model, read when first asked for."""
        if self.model is None:
            began = time.perf_counter()
            self.model = load_model(self.folder, dtype=self.spec.model.dtype, device=self.device)
            self.seconds = time.perf_counter() - began
        return self.model


def pin(spec: RunSpec) -> tuple[RunSpec, Path]:
    """Put a specification into its one spelling and digests of its inputs' content into it.

    Returns it, and the checkpoint folder.

    Raises:
        StarquantError: checkpoint or data files are missing or malformed.
    """
    from starquant.evaluation import offline

    spec = spec.canonical()
    if spec.model.path is None:
        assert spec.model.seed is not None
        folder = weights_folder(spec.model.seed)
    else:
        folder = resolve_folder(spec.model.path, spec.model.revision)
    checkpoint, _ = validate_checkpoint(folder)
    spec = with_bits_of(spec, checkpoint)
    model = spec.model.model_copy(update={"fingerprint": fingerprint(folder)})
    tasks = spec.tasks
    if tasks.data_dir is not None:
        data = offline.check_data(Path(tasks.data_dir), tasks.names)
        tasks = tasks.model_copy(update={"data_fingerprint": data})
    return pin_sources(spec.model_copy(update={"model": model, "tasks": tasks})), folder
