"""Activations of masked and unmasked tokens at every site (STaR-Quant's figure 1).

    python run.py experiment=figure1_activations model=tiny        the report and its figures
    python run.py stage=inspect model=llada                        the report alone

For each block, site and token state: a histogram, the outlier channels and tokens, how few directions hold the state's
energy, and how much of it lies in the directions of least energy of its own and of the other group: what a gate of that
many channels would cost. Groups are SGAT's, masked tokens and all others; of both: whether the same directions hold
their energy, and how many lie below the noise of rounding (`idle_directions`), which says whether gates can pay. Block
diffusion has several states of other tokens, each reported by itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates
from starquant.calibration.site_statistics import Collect, SiteStatistics
from starquant.calibration.walk import walk
from starquant.evaluation.idle_directions import Spectra, Spectrum, groups, idle_directions
from starquant.models.base import MaskedDiffusionModel
from starquant.numerics import TokenState
from starquant.session.progress import SILENT, Progress

SCHEMA_VERSION = 1
ROWS, BINS, OUTLIERS = 512, 81, 8
TOP = 16  # directions of largest energy
HALF_RANGE = 8.0  # of the histogram, in root mean squares of the state; the outermost bins hold what lies beyond
GATE_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
WIDEST = 4096  # second moments of wider sites are left out: [D, D] in float64, twice


@dataclass(frozen=True)
class StateReport:
    """One token state at one site.

    Attributes:
        tokens: that were seen.
        rms: root mean square over tokens and channels.
        absmax: largest magnitude.
        kurtosis: of the sampled values; 3 for a Gaussian.
        crest: mean over sampled tokens of largest magnitude over root mean square: what a scale per token costs.
        channel_share: of the state's energy in its largest channel.
        token_ratio: energy of the largest sampled token over that of the mean one.
        top_energy: share of the energy in the `TOP` directions that hold most of it; None for sites that are too wide.
        outliers: channels of largest magnitude, with their ratio to the median channel's.
        channel_absmax: largest magnitude of every channel.
        density: of values in root mean squares, over [-HALF_RANGE, HALF_RANGE].
        idle_energy: share of the state's energy in the k directions of least energy, of its own and of the other
            state's tokens, by k / D; None for sites that are too wide.
    """

    tokens: int
    rms: float
    absmax: float
    kurtosis: float
    crest: float
    channel_share: float
    token_ratio: float
    top_energy: float | None
    outliers: list[dict[str, float]]
    channel_absmax: list[float]
    density: list[float]
    idle_energy: list[dict[str, float]] | None


def measure(
    model: MaskedDiffusionModel, states: CalibrationStates, progress: Progress = SILENT
) -> list[dict[str, Any]]:
    """Return one row a block and site: its width and a report of each token state.

    Raises:
        DataError: activations that are not finite, states without masked or without unmasked tokens.
    """
    rows = []
    for visit in walk(model, states, progress=progress):
        for site, linears in {site: visit.sites.readers(site) for site in visit.sites.inputs}.items():
            width = next(iter(linears.values())).in_features
            plan = Collect(rows=ROWS, second_moment="state" if width <= WIDEST else None)
            statistics = visit.collect(plan, (site,))[site]
            seen = statistics.learned_states()
            spectra = None if width > WIDEST else {name: Spectrum.of(statistics, g) for name, g in groups(seen).items()}
            shared = {
                "overlap": None if spectra is None else _overlap(spectra),
                "idle_directions": None if spectra is None else idle_directions(statistics, spectra),
            }
            rows.append(
                {"block": visit.index, "site": site.value, "width": width, **shared}
                | {state.value: asdict(_report(statistics, state, spectra)) for state in seen}
            )
    return rows


def _report(statistics: SiteStatistics, state: TokenState, spectra: Spectra | None) -> StateReport:
    moments, rows_ND = statistics.moments(state), statistics.rows(state).double()
    rms = float(moments.rms.square().mean().sqrt())
    absmax_D = moments.absmax.double().cpu()
    typical = absmax_D.median().clamp_min(1e-30)
    top = absmax_D.topk(min(OUTLIERS, len(absmax_D)))
    centred = rows_ND - rows_ND.mean()
    kurtosis = centred.pow(4).mean() / centred.square().mean().square().clamp_min(1e-60)
    scaled = (rows_ND / max(rms, 1e-30)).clamp(-HALF_RANGE, HALF_RANGE).cpu()
    energy_N = rows_ND.square().sum(1)
    energy_D = moments.rms.square()
    own = None if spectra is None else _own_spectrum(statistics, state, spectra)
    counts = torch.histc(scaled, BINS, -HALF_RANGE, HALF_RANGE)
    return StateReport(
        tokens=moments.count,
        rms=rms,
        absmax=float(absmax_D.max()),
        kurtosis=float(kurtosis),
        crest=float((rows_ND.abs().amax(1) / (energy_N / rows_ND.shape[1]).sqrt().clamp_min(1e-30)).mean()),
        channel_share=float(energy_D.max() / energy_D.sum().clamp_min(1e-60)),
        token_ratio=float(energy_N.max() / energy_N.mean().clamp_min(1e-60)),
        top_energy=None if own is None else own.share_of_top(TOP),
        outliers=[{"channel": c, "ratio": float(v / typical)} for v, c in zip(*map(Tensor.tolist, top), strict=True)],
        channel_absmax=[float(f"{x:.4g}") for x in absmax_D.tolist()],
        density=[float(f"{x:.4g}") for x in (counts / counts.sum() * BINS / (2 * HALF_RANGE)).tolist()],
        idle_energy=None if own is None or spectra is None else _idle_energy(statistics, state, own, spectra),
    )


def _own_spectrum(statistics: SiteStatistics, state: TokenState, spectra: Spectra) -> Spectrum:
    """Return a state's spectrum: its group's, where it is the only one there."""
    of_group = {states: spectra[name] for name, states in groups(statistics.learned_states()).items()}
    return of_group[(state,)] if (state,) in of_group else Spectrum.of(statistics, state)


def _overlap(spectra: Spectra) -> float:
    """Return the mean squared cosine between the groups' `TOP` directions: 1 the same, TOP / D of unrelated ones."""
    masked, unmasked = (spectrum.vectors_DD[:, -TOP:] for spectrum in spectra.values())
    return float((masked.T @ unmasked).square().sum() / masked.shape[1])


def _idle_energy(
    statistics: SiteStatistics, state: TokenState, own: Spectrum, spectra: Spectra
) -> list[dict[str, float]]:
    """Return shares of a state's energy in the bottom eigenvectors of its own and of the other group's moment."""
    own_DD = statistics.second_moment(state).mean
    other = spectra["unmasked" if state is TokenState.MASKED else "masked"]
    energies = {}
    for name, basis in (("own", own), ("other", other)):
        vectors = basis.vectors_DD
        energies[name] = ((vectors.T @ own_DD) * vectors.T).sum(1).cumsum(0) / own_DD.trace()
    width = len(own_DD)
    return [
        {"share_of_channels": share}
        | {name: float(e[max(1, round(share * width)) - 1]) for name, e in energies.items()}
        for share in GATE_SHARES
    ]


def report(
    model: MaskedDiffusionModel, states: CalibrationStates, identity: dict[str, Any], progress: Progress = SILENT
) -> dict[str, Any]:
    """Return the whole report as plain data.

    Args:
        model: at full precision.
        states: that it sees, of masked and of unmasked tokens.
        identity: what it is of, kept in the report.
        progress: draws bars.

    Raises:
        DataError: as `measure`.
    """
    return {
        "kind": "activations",
        "schema_version": SCHEMA_VERSION,
        "half_range": HALF_RANGE,
        **identity,
        "states": states.report,
        "rows": measure(model, states, progress),
    }
