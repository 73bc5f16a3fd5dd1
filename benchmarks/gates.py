"""What gates and a learned P do at single sites: the error of a site's output on rows that nothing was learned from.

    .venv/bin/python benchmarks/gates.py model=smol --blocks 2 10 20 --out gates.csv

The other words are overrides of a run; its model, bits, calibration text and rotation are used. Every variant of a site
sees the same rows, exact inputs, weights rounded to nearest with searched clips. Errors are relative squared errors of
the output, of the tokens of each state; `training` is their sum on the rows that P was learned on, `ungated` the
sum with the same P and clips without gates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from torch import Tensor

from starquant.calibration.site_statistics import Collect, SiteStatistics
from starquant.calibration.walk import BlockVisit, walk
from starquant.config.bits import BitsSpec
from starquant.config.methods import METHODS
from starquant.config.methods.star_quant import STaRQuantOptions, TransformOptions
from starquant.config.run import RunSpec
from starquant.errors import one_line_errors
from starquant.methods.fitted import Fitted
from starquant.methods.star_quant.base_transform import Group, Learned, Transform, output_errors
from starquant.methods.star_quant.learned_transform import learn
from starquant.methods.star_quant.sgat import Gate, closed_form
from starquant.methods.star_quant.site_transforms import groups_of, start_of
from starquant.models.roles import Site
from starquant.numerics.token_states import TokenState, of_groups
from starquant.runs.calibrate import calibration_states
from starquant.runs.inputs import pin
from starquant.session.session import Session
from starquant.sweeps.command_line import plan_of

STATES = [state.value for state in TokenState]
ROWS = 2048  # of each state, to learn from and to judge by
SHARE = 1 / 32


@dataclass(frozen=True)
class Variant:
    """How P comes about and which channels are gated.

    Attributes:
        fit: "fixed", "closed_form" or "learned".
        start: of what is learned.
        gate: shares of the channels (d_m, d_u).
        structure: of P.
        steps: of Adam.
        rows: of each state that are learned from.
        clip: learn a clip ratio a state.
        batch: rows of each state in a step.
        products: while it is learned.
    """

    name: str
    fit: str = "learned"
    start: str = "rotation"
    gate: tuple[float, float] = (0.0, 0.0)
    structure: str = "dense"
    steps: int = 160
    rows: int = 1024
    clip: bool = True
    batch: int = 128
    products: str = "auto"


BOTH = (SHARE, SHARE)
VARIANTS = (
    Variant("rotation", "fixed", clip=False),
    Variant("rotation, clips", "fixed"),
    Variant("learned, 80 steps", steps=80),
    Variant("learned"),
    Variant("learned, 400 steps", steps=400),
    Variant("learned, 256 rows", rows=256, batch=256),
    Variant("learned, 256 rows, float32 products", rows=256, batch=256, products="float32"),
    Variant("learned, 2048 rows", rows=2048),
    Variant("learned, 2048 rows, 400 steps", rows=2048, steps=400),
    Variant("learned, Kronecker", structure="kronecker"),
    Variant("gates on the rotation, clips", "fixed", gate=BOTH),
    Variant("learned with gates", gate=BOTH),
    Variant("learned with gates, Kronecker", gate=BOTH, structure="kronecker"),
    Variant("closed form, no gate", "closed_form", gate=(0.0, 0.0)),
    Variant("closed form, gates", "closed_form", gate=BOTH),
    Variant("closed form, gates, no clips", "closed_form", gate=BOTH, clip=False),
    Variant("closed form, only masked tokens gated", "closed_form", gate=(0.0, SHARE)),
    Variant("closed form, only unmasked tokens gated", "closed_form", gate=(SHARE, 0.0)),
    Variant("closed form, gates 1/64", "closed_form", gate=(1 / 64, 1 / 64)),
    Variant("closed form, gates 1/8", "closed_form", gate=(1 / 8, 1 / 8)),
    Variant("closed form, masked tokens gated 1/4", "closed_form", gate=(0.0, 1 / 4)),
    Variant("closed form, masked tokens gated 0.45", "closed_form", gate=(0.0, 0.45)),
    Variant("learned from the closed form, gates", start="closed_form", gate=BOTH),
    Variant("learned from the closed form, gates, 2048 rows", start="closed_form", gate=BOTH, rows=2048),
)


@dataclass(frozen=True)
class Place:
    """A site of a block with all that its variants share."""

    visit: BlockVisit
    site: Site
    statistics: SiteStatistics
    bits: BitsSpec
    options: STaRQuantOptions

    def measure(self, variant: Variant) -> dict[str, object]:
        """Return the errors of a variant."""
        options = self.options.model_copy(
            update={
                "transform": TransformOptions(
                    fit=variant.fit,  # type: ignore[arg-type]
                    structure=variant.structure,  # type: ignore[arg-type]
                    steps=variant.steps,
                    rows=ROWS,
                    products=variant.products,  # type: ignore[arg-type]
                    batch=variant.batch,
                    state_clip=variant.clip,
                )
            }
        )
        width = self.visit.sites.width(self.site)
        gate = Gate(*(round(share * width) for share in variant.gate), "asked")
        trained, judged = groups_of(self.visit, self.site, self.statistics, self.bits, options, gate)
        trained = replace(trained, rows_SND=tuple(rows[: variant.rows] for rows in trained.rows_SND))
        of_start = options.model_copy(update={"transform": options.transform.model_copy(update={"fit": "learned"})})
        start, _ = start_of(self.visit.sites, self.site, of_start, Fitted())  # QuaRot's Hadamards, whatever is learned
        if "closed_form" in (variant.fit, variant.start):
            start = [start[0] @ self._closed(start[0], gate)]
        learned = self._learned(trained, start, variant, options.transform)
        errors = output_errors(judged, learned.transform, learned.state_clip)
        error = {state.value: number for state, number in zip(judged.states, errors, strict=True)}
        error["training"] = sum(output_errors(trained, learned.transform, learned.state_clip))
        error["ungated"] = sum(output_errors(replace(judged, gate=(0, 0)), learned.transform, learned.state_clip))
        return {"block": self.visit.index, "site": self.site.value, **asdict(variant), **error}

    def _closed(self, start_DD: Tensor, gate: Gate) -> Tensor:
        groups = of_groups(self.statistics.learned_states())
        moments = [self.statistics.second_moment(states).mean.cpu() for states in groups]
        return closed_form(*(start_DD.T @ moment @ start_DD for moment in moments), gate.widths)

    def _learned(self, group: Group, start: Sequence[Tensor], variant: Variant, options: TransformOptions) -> Learned:
        if variant.fit == "learned":
            return learn(group, Transform(start), options)
        if variant.clip:
            return learn(group, Transform(start), options, rotate=False)
        return Learned(Transform(start).to(group.weights[0].float()), None)


def places(spec: RunSpec, blocks: Sequence[int], sites: Sequence[Site]) -> Iterator[Place]:
    """Yield the sites of the blocks, rotated and fed as a fit of the run's method sees them."""
    inputs, session = pin(spec), Session.open()
    loaded = inputs.load("cpu")
    states = calibration_states(inputs.spec, loaded, session)
    assert states is not None
    method, options = METHODS.build(inputs.spec.method), inputs.spec.method
    assert isinstance(options, STaRQuantOptions)
    fitted = Fitted()
    ends = method.ends(loaded.model, spec.bits, fitted, states)  # type: ignore[attr-defined]
    for visit in walk(loaded.model, states, lambda hidden: method.embed(hidden, ends)):  # type: ignore[attr-defined]
        method.prepare(visit.sites, ends)  # type: ignore[attr-defined]
        if visit.index in blocks:
            statistics = visit.collect(Collect(moments=False, rows=2 * ROWS, second_moment="state"), sites)
            for site in sites:
                yield Place(visit, site, statistics[site], spec.bits, options)
        if visit.index >= max(blocks):
            return


@one_line_errors(OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a variant, and keep them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 10, 20])
    parser.add_argument("--sites", nargs="+", default=["qkv_input", "down_input"], choices=[s.value for s in Site])
    parser.add_argument("--quick", action="store_true", help="at most 160 steps and 1,024 rows")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_intermixed_args(arguments)
    plan = plan_of([*args.overrides, "method=star_quant"])
    assert plan is not None
    rows = []
    for place in places(plan.cells[0].spec, args.blocks, [Site(name) for name in args.sites]):
        for variant in VARIANTS:
            if args.quick and (variant.steps > 160 or variant.rows > 1024):
                continue
            row = place.measure(variant)
            rows.append(row)
            errors = " ".join(f"{row[name]:.4f}" for name in STATES if name in row)
            errors += f"  training {row['training']:.4f} ungated {row['ungated']:.4f}"
            print(f"block {row['block']} {row['site']:12s} {variant.name:48s} {errors}", flush=True)
            pd.DataFrame(rows).to_csv(args.out, index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
