"""Which checkpoint, in which precision, under which evaluation protocol."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from starquant.config.fields import Spec
from starquant.config.protocol import TaskProtocol
from starquant.config.samplers import AnySampler


class ModelSpec(Spec):
    """Which checkpoint, in which precision, under which evaluation protocol.

    Attributes:
        path: hub id or local folder; null for the embedded model of `seed`.
        trajectory: sampler of the denoising trajectories that calibration and fidelity look at.
        fingerprint: digest of the checkpoint's content, filled in when it is found; it then stands for `path`.
    """

    name: str
    path: str | None = None
    revision: str | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    protocol: dict[str, TaskProtocol]
    trajectory: AnySampler
    fingerprint: str | None = None

    @model_validator(mode="after")
    def _validate_origin(self) -> ModelSpec:
        if (self.path is None) == (self.seed is None):
            raise ValueError(
                "give either path (a checkpoint) or seed (the embedded model), the other null; "
                "for a checkpoint start from model=llada, model=llada_1_5 or model=dream"
            )
        return self
