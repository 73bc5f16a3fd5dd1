"""What a run has to make, and what lies there already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from starquant.config.run import RunSpec
from starquant.runs.record import store_of
from starquant.session.session import Session
from starquant.store.artifacts import ArtifactStore
from starquant.store.exports import exported_from


@dataclass(frozen=True)
class Missing:
    """What a run has to make: what is not on disk, of this code or by `reuse`."""

    baseline: bool
    record: bool
    calibration: bool
    export: bool

    @classmethod
    def of(cls, spec: RunSpec, session: Session) -> Missing:
        """Look at what is there; nothing is changed."""
        made = spec.export.dir is None or exported_from(Path(spec.export.dir)) == spec.digest()
        record = spec.is_scored and not _has_record(spec, session)
        calibration = (
            spec.quantizes and not _has_calibration(spec, session) and (record or not made or not spec.is_scored)
        )
        baseline = spec.is_scored and not spec.is_baseline and not _has_record(spec.baseline(), session)
        return cls(baseline, record, calibration, not made)

    @property
    def nothing(self) -> bool:
        """Whether all of it is there."""
        return not (self.baseline or self.record or self.calibration or self.export)


def _has_record(spec: RunSpec, session: Session) -> bool:
    record = None if spec.reuse == "never" else store_of(spec).find(spec, alone=False)
    if record is None:
        return False
    same_code = record.provenance.get("code_digest") == session.code.scoring
    return spec.reuse == "any" or (same_code and record.seal is not None)


def _has_calibration(spec: RunSpec, session: Session) -> bool:
    if spec.reuse == "never" and spec.stage != "evaluate":
        return False
    artifact = ArtifactStore(Path(spec.paths.results)).find(spec.calibration_digest(), alone=False)
    return artifact is not None and (spec.reuse == "any" or artifact.code_digest == session.code.fitting)
