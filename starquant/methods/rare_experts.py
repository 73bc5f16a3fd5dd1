"""Experts that calibration rarely reaches: noted by a fit, named in the manifest."""

from __future__ import annotations

from collections.abc import Sequence

from starquant.calibration.walk import BlockVisit
from starquant.methods.fitted import Fitted
from starquant.store.manifest import ManifestEntry

#: What is said of such an expert, by what was done (`config.calibration.ExpertsSpec.rare`).
RARE = {
    "pooled": "rarely reached by calibration: statistics of all tokens of its layer",
    "round": "rarely reached by calibration: no statistics, rounded to nearest",
}


def note_rare_experts(visit: BlockVisit, fitted: Fitted) -> None:
    """Note a visit's experts that few tokens reached, under the name of their input site."""
    names = {info.role.site: info.site for info in visit.linears.values()}
    states = visit.model.states
    for site, tokens in visit.rare.items():
        counts = {f"{state.value}_tokens": count for state, count in zip(states, tokens, strict=True)}
        fitted.note(RARE[visit.states.rare_experts], names[site], **counts)


def with_rare_experts(entries: Sequence[ManifestEntry], fitted: Fitted) -> list[ManifestEntry]:
    """Return a manifest that says of every linear whose statistics are not its own."""
    said = {note["where"]: note["what"] for note in fitted.notes if note["what"] in RARE.values()}
    return [
        entry.model_copy(update={"calibration": said[entry.site]}) if entry.site in said else entry for entry in entries
    ]
