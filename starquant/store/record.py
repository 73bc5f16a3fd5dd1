"""The record of one run: everything a table needs, and where it came from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from starquant.store.files import FileEntry
from starquant.store.manifest import ManifestEntry

SCHEMA_VERSION = 4
#: Version 1 had neither confidence intervals and units of scores nor the calibration, 2 no report of the fit, 3 no
#: seal.
READABLE_VERSIONS = (1, 2, 3, 4)
#: The first version whose records tell whether they are what was written.
FIRST_SEALED = 4


class Score(BaseModel):
    """One metric of one task under one filter; nothing of what lm-eval reports about it is dropped.

    Attributes:
        stderr: lm-eval's; of fidelity, the bootstrap's over prompts.
        n: items; of fidelity, prompts.
        ci_low: lower end of the 95 % percentile bootstrap interval, None where there is none.
        ci_high: its upper end.
        unit: of value, stderr and interval; relative: to the size of what is compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool | None
    task_version: str | None
    num_fewshot: int | None
    ci_low: float | None = None
    ci_high: float | None = None
    unit: Literal["fraction", "nats", "relative"] = "fraction"


class Timings(BaseModel):
    """How long a run took and what memory.

    Attributes:
        seconds: of the clock by stage; parts of a stage are named "evaluate/TASK" and count in it.
        peak_host_memory_gb: of the process.
        peak_device_memory_gb: of the accelerator, None without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: dict[str, float]
    peak_host_memory_gb: float
    peak_device_memory_gb: float | None

    @property
    def total_s(self) -> float:
        """Seconds of all stages."""
        return sum(seconds for stage, seconds in self.seconds.items() if "/" not in stage)


class Seal(BaseModel):
    """What a record and its items were when they were written.

    Attributes:
        content: SHA-256 of the record as canonical JSON, without this digest.
        items: the files of NAME.items, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    content: str = ""
    items: dict[str, FileEntry]


class RecordHead(BaseModel):
    """What tables read of a finished run; they read many.

    Attributes:
        digest: of the specification; the same digest is the same experiment.
        spec: the validated specification.
        scores: of every task, groups and their subjects.
        provenance: git SHA and dirty flag, source digest, package versions, device, time; what a sandbox held.
        seal: put on as it is written; None before, and of records before `FIRST_SEALED`, which cannot be verified.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int = SCHEMA_VERSION
    digest: str
    spec: dict[str, Any]
    status: Literal["complete"]
    scores: list[Score]
    provenance: dict[str, Any]
    seal: Seal | None = None


class RunRecord(RecordHead):
    """One finished run.

    Attributes:
        manifest: what was quantized, entry by entry.
        calibration: what the method was calibrated on, None without.
        fit_report: what the method found at each site: choices, errors, clip ratios.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: list[ManifestEntry]
    calibration: dict[str, Any] | None = None
    fit_report: list[dict[str, Any]] = []
    timings: Timings
