"""Activations of masked and unmasked tokens at every site (STaR-Quant's figure 1).

    python -m starquant.diagnostics.activations --out activations.json                      the embedded model
    python -m starquant.diagnostics.activations --model GSAI-ML/LLaDA-8B-Base --source winogrande --out FILE

For each block, site and token state: a histogram, the outlier channels, and how much of the state's energy lies in the
directions of least energy of either state: what a gate of that many channels would cost.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates
from starquant.calibration.engine import walk
from starquant.calibration.sources import read_segments
from starquant.calibration.states import make_states
from starquant.calibration.statistics import Collect, SiteStatistics, TokenState
from starquant.errors import ConfigError, StarquantError
from starquant.models import load_model, load_tokenizer, resolve_folder
from starquant.models.base import MaskedDiffusionModel
from starquant.records import provenance
from starquant.sources import CalibrationSpec, SourceSpec, StatesSpec
from starquant.testbed.shipped import weights_folder

SCHEMA_VERSION = 1
ROWS, BINS, OUTLIERS = 512, 81, 8
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
    outliers: list[dict[str, float]]
    channel_absmax: list[float]
    density: list[float]
    idle_energy: list[dict[str, float]] | None


def measure(model: MaskedDiffusionModel, states: CalibrationStates, progress: bool = False) -> list[dict[str, Any]]:
    """Return one row a block and site: its width and a report of each token state.

    Raises:
        DataError: activations that are not finite, states without masked or without unmasked tokens.
    """
    rows = []
    for visit in walk(model, states, progress=progress):
        for site, linears in {site: visit.sites.readers(site) for site in visit.sites.inputs}.items():
            width = next(iter(linears.values())).in_features
            plan = Collect(rows=ROWS, second_moment="state" if width <= WIDEST else None)
            found = visit.collect(plan, (site,))[site]
            rows.append(
                {"block": visit.index, "site": site.value, "width": width}
                | {state.value: asdict(_report(found, state)) for state in TokenState}
            )
    return rows


def _report(statistics: SiteStatistics, state: TokenState) -> StateReport:
    moments, rows_ND = statistics.moments(state), statistics.rows(state).double()
    rms = float(moments.rms.square().mean().sqrt())
    absmax_D = moments.absmax.double().cpu()
    typical = absmax_D.median().clamp_min(1e-30)
    top = absmax_D.topk(min(OUTLIERS, len(absmax_D)))
    centred = rows_ND - rows_ND.mean()
    kurtosis = centred.pow(4).mean() / centred.square().mean().square().clamp_min(1e-60)
    scaled = (rows_ND / max(rms, 1e-30)).clamp(-HALF_RANGE, HALF_RANGE).cpu()
    counts = torch.histc(scaled, BINS, -HALF_RANGE, HALF_RANGE)
    return StateReport(
        tokens=moments.count,
        rms=rms,
        absmax=float(absmax_D.max()),
        kurtosis=float(kurtosis),
        outliers=[{"channel": c, "ratio": float(v / typical)} for v, c in zip(*map(Tensor.tolist, top), strict=True)],
        channel_absmax=[float(f"{x:.4g}") for x in absmax_D.tolist()],
        density=[float(f"{x:.4g}") for x in (counts / counts.sum() * BINS / (2 * HALF_RANGE)).tolist()],
        idle_energy=None if statistics.collect.second_moment is None else _idle_energy(statistics, state),
    )


def _idle_energy(statistics: SiteStatistics, state: TokenState) -> list[dict[str, float]]:
    """Return shares of a state's energy in the bottom eigenvectors of its own and of the other state's moment."""
    own_DD = statistics.second_moment(state).mean
    other = next(s for s in TokenState if s is not state)
    bases = {"own": own_DD, "other": statistics.second_moment(other).mean}
    energies = {}
    for name, moment in bases.items():
        vectors = torch.linalg.eigh(moment)[1]  # ascending
        energies[name] = ((vectors.T @ own_DD) * vectors.T).sum(1).cumsum(0) / own_DD.trace()
    width = len(own_DD)
    return [
        {"share_of_channels": share}
        | {name: float(e[max(1, round(share * width)) - 1]) for name, e in energies.items()}
        for share in GATE_SHARES
    ]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, measure and return the report.

    Raises:
        StarquantError: a model, text or device that cannot be used.
    """
    asked, seed = arguments.model, arguments.model_seed
    folder = weights_folder(seed) if asked is None else resolve_folder(asked, None)
    model = load_model(folder, dtype=arguments.dtype, device=arguments.device)
    source = SourceSpec(
        kind=arguments.source, path=arguments.source_path, segments=arguments.segments, length=arguments.length
    )
    masked = CalibrationSpec(name=arguments.source, source=source, states=StatesSpec(sampler="uniform"))
    segments = read_segments(
        source, load_tokenizer(folder), model.config.context_length, seed=0, data_dir=None, where="--source"
    )
    states = make_states(segments, masked, model, None, report={}, progress=sys.stderr.isatty())
    return {
        "kind": "activations",
        "schema_version": SCHEMA_VERSION,
        "half_range": HALF_RANGE,
        "model": asked or f"embedded, seed {seed}",
        "source": source.model_dump(mode="json"),
        "states": states.report,
        "rows": measure(model, states, progress=sys.stderr.isatty()),
        "provenance": provenance.collect(arguments.device, arguments.device),
    }


def main(given: Sequence[str] | None = None) -> int:
    """Command line; returns 2 after bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m starquant.diagnostics.activations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", help="hub id or local folder; the embedded model without")
    parser.add_argument("--model-seed", type=int, default=0, help="which embedded model")
    parser.add_argument("--source", default="testbed", choices=("testbed", "winogrande", "gsm8k", "text"))
    parser.add_argument("--source-path", help="local file instead of the hub")
    parser.add_argument("--segments", type=int, default=128)
    parser.add_argument("--length", type=int, default=64, help="tokens a segment")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(given)
    try:
        if arguments.source == "text" and arguments.source_path is None:
            raise ConfigError("--source-path: got nothing, but --source text needs a .txt or .jsonl file")
        for name in ("segments", "length"):
            if getattr(arguments, name) < 1:
                raise ConfigError(f"--{name}: got {getattr(arguments, name)}, allowed: at least 1")
        if not arguments.out.parent.is_dir() or arguments.out.is_dir():
            raise ConfigError(f"--out: {arguments.out} is no file in an existing folder")
        report = run(arguments)
        part = arguments.out.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        part.replace(arguments.out)
    except (StarquantError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
