"""Which text calibration and fidelity states are made of, and how it is masked. Plain validated data, no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from starquant.config.fields import Name, Rows, Seed, Share, Spec, Tokens, UserPath

#: Mask-ratio bins; each has statistics of its own.
Bins = Annotated[int, Field(ge=1, le=64)]
#: Texts of a source: a generator is exhausted in seconds.
Segments = Annotated[int, Field(ge=1, le=16_384)]
#: Tokens of all states of a calibration, or of all segments of a source, together.
MOST_TOKENS = 2**28


class SourceSpec(Spec):
    """Text, cut into segments of at most `length` tokens.

    Attributes:
        kind: "winogrande" and "gsm8k" (hub, or `path`), "text" (a .txt or .jsonl file), "testbed" (generated
            items of the embedded model), "smol_text" (natural text that is shipped), "smol_tasks"
            (generated items of smol), "smol" (the two in turn).
        path: local file to read instead of the hub; needed for "text".
        split: of the data set; "text" has none and ignores it.
        segments: number of segments.
        length: tokens a segment.
    """

    kind: Literal["winogrande", "gsm8k", "text", "testbed", "smol", "smol_tasks", "smol_text"]
    path: UserPath | None = None
    split: Literal["train", "validation", "test"] = "train"
    segments: Segments
    length: Tokens

    @model_validator(mode="after")
    def _validate_path(self) -> SourceSpec:
        if self.kind == "text" and self.path is None:
            raise ValueError("path: a source of kind 'text' needs a .txt or .jsonl file")
        if self.segments * self.length > MOST_TOKENS:
            raise ValueError(
                f"segments: got {self.segments} of length {self.length}, allowed: at most {MOST_TOKENS:,} tokens in all"
            )
        return self


class StatesSpec(Spec):
    """How segments become partly masked states.

    Attributes:
        sampler: "clean" leaves the text as it is (what autoregressive methods calibrate on); "uniform" masks a
            ratio t ~ U(min_ratio, max_ratio) of each segment's maskable tokens, stratified over the segments;
            "trajectory" takes states of real denoising trajectories of the full-precision model.
        min_ratio: smallest mask ratio of "uniform".
        max_ratio: largest mask ratio of "uniform".
        per_segment: states made of one segment.
        shares: of "trajectory": share of the states from each of as many equally wide mask-ratio buckets, low
            ratios first (TMAS, arXiv 2508.14090); null takes steps evenly spread along the trajectory.
    """

    sampler: Literal["clean", "uniform", "trajectory"]
    min_ratio: Share = 0.0
    max_ratio: Share = 1.0
    per_segment: Annotated[int, Field(ge=1, le=1024)] = 1
    shares: tuple[Share, ...] | None = None

    @model_validator(mode="after")
    def _validate_ratios(self) -> StatesSpec:
        if self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio: got {self.min_ratio}, allowed: at most max_ratio = {self.max_ratio}")
        if self.shares is not None and (not self.shares or abs(sum(self.shares) - 1.0) > 1e-6):
            raise ValueError(f"shares: got {list(self.shares)}, allowed: numbers that add up to 1")
        if self.shares is not None and self.sampler != "trajectory":
            raise ValueError(f"shares: belong to sampler 'trajectory', got '{self.sampler}'")
        return self


#: TMAS as a public reading of arXiv 2508.14090 gives it: four mask-ratio buckets, the extremes weighted more.
TMAS_SHARES = (0.3, 0.2, 0.2, 0.3)


class ExpertsSpec(Spec):
    """What becomes of an expert of a mixture that calibration rarely reaches.

    Attributes:
        least_tokens: of each token state, that an expert's own statistics are made of at least; fewer where all states
            together have fewer.
        rare: below that, "pooled" takes what the expert gives for all tokens of its layer, as though each had been
            routed to it; "round" leaves it without transform and statistics, its weights rounded to nearest.
    """

    least_tokens: Annotated[int, Field(ge=0, le=2**20)] = 16
    rare: Literal["pooled", "round"] = "pooled"


class CalibrationSpec(Spec):
    """What calibration sees.

    Attributes:
        name: of the preset.
        source: the text; null for none.
        states: how it is masked.
        inputs: what each block is fed: the output of the full-precision blocks before it, of those with quantized
            weights (as the official GPTQ and QuaRot do), or of the quantized ones.
        bins: equally wide mask-ratio bins that statistics are kept for.
        seed: of segments, masks and trajectories.
        threads: of the CPU, while the method learns and is applied: what is learned depends on their number, so that it
            is not the machine's or `runtime.threads`. More than 1 is another calibration, quicker on a large CPU.
        experts: of mixtures, those that it rarely reaches; without effect on dense models.
        fingerprint: digest of the text, filled in when it is read; it then stands for `source.path`.
    """

    name: Name
    source: SourceSpec | None = None
    states: StatesSpec = StatesSpec(sampler="uniform")
    inputs: Literal["full_precision", "quantized_weights", "quantized"] = "full_precision"
    bins: Bins = 4
    seed: Seed = 0
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    experts: ExpertsSpec = ExpertsSpec()
    fingerprint: str | None = None

    @model_validator(mode="after")
    def _validate_states(self) -> CalibrationSpec:
        _validate_states(self.source, self.states)
        return self


class FidelitySpec(Spec):
    """How closely a quantized model follows full precision on held-out denoising trajectories.

    Attributes:
        name: of the preset.
        source: prompts, or text, that no calibration reads; null measures nothing.
        states: null follows denoising trajectories from the prompts; "uniform" masks the text itself.
        bins: equally wide mask-ratio bins that metrics are reported for.
        positions: masked positions measured a state; of more, evenly spaced ones stand for all.
        resamples: bootstrap resamples of the prompts, for confidence intervals.
        fingerprint: digest of the text, filled in when it is read; it then stands for `source.path`.
    """

    name: Name
    source: SourceSpec | None = None
    states: StatesSpec | None = None
    bins: Bins = 4
    positions: Rows = 64
    resamples: Annotated[int, Field(ge=2, le=1_000_000)] = 2000
    fingerprint: str | None = None

    @model_validator(mode="after")
    def _validate_states(self) -> FidelitySpec:
        if self.states is not None and self.states.sampler != "uniform":
            raise ValueError(f"states.sampler: got '{self.states.sampler}', allowed: uniform (or states=null)")
        if self.states is not None:
            _validate_states(self.source, self.states)
        return self


def _validate_states(source: SourceSpec | None, states: StatesSpec) -> None:
    tokens = 0 if source is None else source.segments * source.length * states.per_segment
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"states.per_segment: got {states.per_segment}, with which the states of source.segments and source.length "
            f"have {tokens:,} tokens; allowed: at most {MOST_TOKENS:,}"
        )
