"""Which checkpoint, in which precision, under which evaluation protocol."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from starquant.config.fields import INERT, Name, Seed, Spec, TaskName, UserPath
from starquant.config.protocol import TaskProtocol
from starquant.config.samplers import AnySampler


class ModelSpec(Spec):
    """Which checkpoint, in which precision, under which evaluation protocol.

    Attributes:
        path: hub id or local folder; null for the test-bed's model of `seed`.
        testbed: which test-bed that is: "tiny", "tiny_sdar", "tiny_llada_moe" (shipped) or "smol" (built once by
            `make smol`). The fingerprint tells their checkpoints apart.
        chat_template: "auto" puts every prompt of a task into the checkpoint's own chat template, few-shot examples as
            turns (lm-eval's `--apply_chat_template`); a checkpoint without one is refused. "none": raw text.
        trajectory: sampler of the denoising trajectories that calibration and fidelity look at.
        fingerprint: digest of the checkpoint's content, filled in when it is found; it then stands for `path`.
        engine: what computes: torch, or llama.cpp, of which `path` names a GGUF.
        checkpoint: hub id or local folder that the GGUF was made of: its tokenizer, and full precision to compare with;
            null for the test-bed's model of `seed`.
        file_fingerprint: digest of the GGUF, filled in.
    """

    name: Name
    path: UserPath | None = None
    revision: str | None = None
    testbed: Literal["tiny", "tiny_sdar", "tiny_llada_moe", "smol"] = Field(default="tiny", json_schema_extra=INERT)
    seed: Seed | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    chat_template: Literal["auto", "none"] = "none"
    protocol: dict[TaskName, TaskProtocol]
    trajectory: AnySampler
    fingerprint: str | None = None
    engine: Literal["torch", "llama_cpp"] = "torch"
    checkpoint: UserPath | None = None
    file_fingerprint: str | None = None

    @property
    def source(self) -> str | None:
        """Hub id or local folder of the checkpoint, None for the test-bed's."""
        return self.path if self.engine == "torch" else self.checkpoint

    @model_validator(mode="after")
    def _validate_origin(self) -> ModelSpec:
        if self.engine == "llama_cpp":
            if self.path is None or not self.path.endswith(".gguf"):
                raise ValueError(f"path: got {self.path} with engine=llama_cpp, allowed: a file FILE.gguf")
            if (self.checkpoint is None) == (self.seed is None):
                raise ValueError(
                    "give either checkpoint (that the GGUF was made of) or seed (a model of a test-bed), the other null"
                )
            return self
        if self.checkpoint is not None:
            raise ValueError(f"checkpoint: got {self.checkpoint} with engine=torch, allowed: null (path names it)")
        if (self.path is None) == (self.seed is None):
            raise ValueError(
                "give either path (a checkpoint) or seed (a model of a test-bed), the other null (model.seed=null); "
                "for a checkpoint start from model=llada, model=llada_1_5 or model=dream"
            )
        return self
