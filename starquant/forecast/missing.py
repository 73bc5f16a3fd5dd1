"""What a run has to make, and what lies there already."""

from __future__ import annotations

from dataclasses import dataclass

from starquant.config.run import RunSpec
from starquant.runs.calibrate import reusable_artifact
from starquant.runs.export import has_export
from starquant.runs.record import is_current, kept_record
from starquant.session.session import Session


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
        made = spec.export.dir is None or has_export(spec)
        record = spec.is_scored and not _has_record(spec, session)
        needed = spec.quantizes and (record or not made or not spec.is_scored)
        calibration = needed and reusable_artifact(spec, session) is None
        baseline = spec.is_scored and not spec.is_baseline and not _has_record(spec.baseline(), session)
        return cls(baseline, record, calibration, not made)

    @property
    def nothing(self) -> bool:
        """Whether all of it is there."""
        return not (self.baseline or self.record or self.calibration or self.export)


def _has_record(spec: RunSpec, session: Session) -> bool:
    """Return whether a record lies there; of other items than are read here it may be: these are not read."""
    record = kept_record(spec, session)
    return record is not None and is_current(spec, record, session)
