"""How a run is executed, where it writes and who is told: nothing here can change a score."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from starquant.config.fields import Name, Spec, UserPath

#: Sequences of a forward pass: `runtime.batch_size`.
MOST_SEQUENCES = 65_536


class TrackerSpec(Spec):
    """Who is told of a finished run. Inert as a whole."""

    name: Literal["none", "wandb"]
    project: str = "starquant"
    entity: str | None = None
    mode: Literal["online", "offline"] = "offline"
    dir: UserPath | None = None
    timeout_s: Annotated[float, Field(gt=0.0, le=86_400.0)] = 30.0


class ExperimentSpec(Spec):
    """The sweep that a run belongs to, null for none. Inert as a whole.

    Attributes:
        name: of the sweep.
        benchmark: script of benchmarks/ that measures in place of runs; null for none.
    """

    name: Name | None = None
    benchmark: Literal["efficiency"] | None = None


class PathsSpec(Spec):
    """Where results are written. Inert as a whole."""

    results: UserPath


class RuntimeSpec(Spec):
    """How a run is executed. Inert as a whole: scores depend on the batch size ("auto": by memory) by rounding only.

    Attributes:
        device: of torch.
        batch_size: sequences that go through the model at once.
        threads: of the CPU; None leaves torch's own.
        blocks: "memory", "disk" (one block in memory at a time), or "auto": on disk where memory does not hold them.
        packed: how a packed checkpoint multiplies: "values" (bit for bit the fake-quantized model on a CPU), "integers"
            (faster there, up to rounding), or "auto": integers on a GPU.
    """

    device: str = "cpu"
    batch_size: int | str = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    blocks: Literal["auto", "memory", "disk"] = "auto"
    packed: Literal["auto", "values", "integers"] = "auto"

    @field_validator("batch_size", mode="before")
    @classmethod
    def _validate_batch_size(cls, size: Any) -> Any:
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= MOST_SEQUENCES):
            raise ValueError(f"got {size!r}, allowed: auto, or a whole number from 1 to {MOST_SEQUENCES}")
        return size


class ExportSpec(Spec):
    """Where the model is written as it was scored, null for nowhere. Inert as a whole.

    Attributes:
        dir: folder of a packed checkpoint, or the GGUF file.
        format: "packed" for `from_pretrained`, "gguf" for llama.cpp.
        dtype: of what a GGUF holds unquantized, but for norms and biases, which are float32.
        shard_size: of a packed checkpoint's weight file, at most.
    """

    dir: UserPath | None = None
    format: Literal["packed", "gguf"] = "packed"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    shard_size: str = "1GB"

    @field_validator("shard_size", mode="before")
    @classmethod
    def _validate_shard_size(cls, size: Any) -> Any:
        if not isinstance(size, str) or not re.fullmatch("[1-9][0-9]{0,5}[KMG]B", size):
            raise ValueError(f"got {size!r}, allowed: a whole number from 1 to 999999 and KB, MB or GB, such as 1GB")
        return size


class DebugSpec(Spec):
    """What is shown when things go wrong. Inert as a whole."""

    name: Name
    traceback: bool = False
    verbose: bool = False
