"""Files of llama.cpp in a run: scored as they are, written as they were scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from starquant.config.run import RunSpec
from starquant.errors import CheckpointError, ConfigError
from starquant.llama_cpp.architecture import architecture_of
from starquant.llama_cpp.engine import Engine
from starquant.llama_cpp.predictor import LlamaCppPredictor, context_of
from starquant.llama_cpp.reading import GGUFDescription, describe_gguf
from starquant.llama_cpp.seal import validate_seal
from starquant.llama_cpp.writing import write_gguf
from starquant.models.base import MaskedDiffusionModel
from starquant.models.checkpoint import Checkpoint
from starquant.models.loading import load_tokenizer
from starquant.store.cache import content_digest
from starquant.store.exports import exported_otherwise
from starquant.store.record import RunRecord

#: Types of numbers of `export.dtype`.
KINDS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def description_of(spec: RunSpec) -> GGUFDescription:
    """Return what the file that a run scores says of itself."""
    return describe_gguf(Path(spec.model.path or ""))


def with_file(spec: RunSpec, checkpoint: Checkpoint) -> RunSpec:
    """Return the run with digest, bits and maker of the file that it scores; the same run where it scores none.

    Raises:
        CheckpointError: a file that cannot be read, or of another architecture than the checkpoint beside it.
    """
    if not spec.is_gguf:
        return spec
    described = description_of(spec)
    wanted = architecture_of(str(checkpoint.config["model_type"])).name
    if described.architecture != wanted:
        raise CheckpointError(
            f"model.path: {described.path} is of architecture '{described.architecture}', the checkpoint beside it "
            f"({checkpoint.folder}) of '{wanted}'; allowed: the one that the file was made of"
        )
    digest = content_digest(described.path)[:16]
    changes: dict[str, Any] = {"model": spec.model.model_copy(update={"file_fingerprint": digest})}
    if spec.method.name == spec.GGUF:
        changes["method"] = spec.method.model_copy(update={"name": f"gguf_{described.method}"[:48]})
    return spec.model_copy(update=changes | {"bits": described.bits})


def context_length(spec: RunSpec, config: Any) -> int:
    """Return the longest sequence of a run, in tokens: of the model's configuration, or what llama.cpp holds of it."""
    return context_of(config) if spec.is_gguf else int(config.context_length)


def predictor_of(spec: RunSpec, model: MaskedDiffusionModel) -> LlamaCppPredictor:
    """Return llama.cpp with the file loaded.

    Raises:
        ConfigError: llama.cpp is not installed.
        CheckpointError: a file that it does not load.
    """
    context = context_length(spec, model.config)
    engine = Engine(Path(spec.model.path or ""), context, spec.runtime.threads or torch.get_num_threads())
    return LlamaCppPredictor(engine, model)


def write_export(spec: RunSpec, model: MaskedDiffusionModel, record: RunRecord, folder: Path) -> int:
    """Write a model with packed weights, or at full precision; returns the bytes of the file."""
    kind = KINDS[spec.export.dtype]
    made_by = {
        "name": f"{spec.model.name}-{spec.bits.name}-{spec.method.name}",
        "method": spec.method.name,
        "bits": kind.lower() if spec.bits.full_precision else spec.bits.name,
        "record": record.digest,
        "model": str(spec.model.path or f"starquant's {spec.model.testbed}, seed {spec.model.seed}"),
    }
    return write_gguf(model, load_tokenizer(folder), Path(spec.export.dir or ""), kind, made_by)


def validate_exported(spec: RunSpec) -> None:
    """Compare the file at `export.dir` with what this run exports.

    Raises:
        ConfigError: it is another one, is cut, is not what was written, or holds numbers of another type.
    """
    target = Path(spec.export.dir or "")
    try:
        described = describe_gguf(target)
        if described.record == spec.digest():
            validate_seal(target)
    except CheckpointError as error:
        raise ConfigError(f"export.dir: {error}; remove it to export again, or name a new file") from None
    if described.record != spec.digest():
        raise ConfigError(f"export.dir: {target}: is there already; allowed: a new file")
    written = [dtype for dtype, kind in KINDS.items() if kind in described.float_types]  # none: all is quantized
    if written and written != [spec.export.dtype]:
        raise exported_otherwise(target, "dtype", ", ".join(written), spec.export.dtype)
