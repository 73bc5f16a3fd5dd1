"""The paper's tables and figures as data: which runs make a row, and which of the paper's figures stand beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starquant.resources import resource

PAPER = resource("results/paper")
FULL = {"method.name": "none"}

#: Model presets by the paper's names; the embedded model is not the paper's.
PAPER_MODELS = {"llada": "LLaDA-8B", "llada_1_5": "LLaDA-1.5-8B", "dream": "Dream-7B"}
#: The nine tasks by the names of the paper's columns.
PAPER_TASKS = {
    name: name
    for name in ("truthfulqa_mc2", "arc_challenge", "hellaswag", "winogrande", "piqa", "mmlu", "humaneval", "gsm8k")
} | {"ceval-valid": "ceval"}
NINE = (
    *("truthfulqa_mc2", "arc_challenge", "hellaswag", "winogrande", "piqa"),
    *("mmlu", "ceval-valid", "humaneval", "gsm8k"),
)
#: The metric of a task's column and its filter. The paper names none: `acc` where its figures fit it (HellaSwag near 54
#: is acc, acc_norm is near 70), our choice elsewhere. Tasks that are not listed show their first metric.
PRIMARY = {
    "truthfulqa_mc2": ("acc", "none"),
    "arc_challenge": ("acc", "none"),
    "hellaswag": ("acc", "none"),
    "winogrande": ("acc", "none"),
    "piqa": ("acc", "none"),
    "mmlu": ("acc", "none"),
    "ceval-valid": ("acc", "none"),
    "humaneval": ("pass@1", None),
    "gsm8k": ("exact_match", "flexible-extract"),
}


@dataclass(frozen=True)
class RowOf:
    """A row: its label, the runs that make it, and how the paper calls it.

    Attributes:
        label: of the row.
        where: dotted configuration keys and their values.
        paper: values of the paper's columns that name the row; None where the paper has no such row.
    """

    label: str
    where: dict[str, Any]
    paper: dict[str, Any] | None = None


@dataclass(frozen=True)
class Definition:
    """A table or figure of the paper.

    Attributes:
        name: of the experiment.
        title: what it shows.
        rows: of the table, or lines of the figure; full precision first.
        paper: the paper's figures, None where it prints none.
        against: label of the row that the others are compared with, None for no comparison.
        also_against: labels of more such rows, of tables over seeds.
        grids: rows may be on any grid; else a table is of one, authors' or common.
        draw: of a figure, the function of `reports.figures` that takes (label, record) pairs.
    """

    name: str
    title: str
    rows: tuple[RowOf, ...]
    paper: Path | None = None
    against: str | None = None
    also_against: tuple[str, ...] = ()
    grids: bool = False
    draw: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for labels that are not of one row."""
        labels = [row.label for row in self.rows]
        if len(set(labels)) < len(labels):
            raise ValueError(f"{self.name}: rows share a label: {', '.join(labels)}")
        for against in (self.against, *self.also_against):
            if against is not None and against not in labels:
                raise ValueError(f"{self.name}: against is '{against}', allowed: {', '.join(labels)}")


def _row(label: str, name: str, bits: str, block_size: int | None = None, /, **paper: Any) -> RowOf:
    """Return a method's row; `paper` names the paper's, beside the bits."""
    where: dict[str, Any] = {"method.name": name, "bits.name": bits, "bits.attention.v": 16, "bits.attention.p": 16}
    where |= {} if block_size is None else {"method.tac.block_size": block_size}
    return RowOf(label, where, {**paper, "bits": bits} if paper else None)


def _variants(whole: dict[str, Any], changed: dict[str, dict[str, Any]]) -> tuple[RowOf, ...]:
    """Return rows by their labels: each is the whole with what it changes."""
    return tuple(RowOf(label, whole | keys) for label, keys in changed.items())


FULL_ROW = RowOf("full precision", FULL, {"method": "FP16"})
ABLATION_FULL = RowOf("full precision", FULL, {"variant": "FP16"})

_KV_METHODS = {"RTN": "rtn", "GPTQ": "gptq", "QuaRot": "quarot", "STaR-Quant": "star_quant"}
_KV_METHODS |= {"star_quant_plus (ours)": "star_quant_plus"}
#: Bits of everything, bits of keys and values, when these are rounded.
_KV = (
    ("w4a4", 16, "read"),
    *(("w4a4_kv8", 8, at) for at in ("read", "commit")),
    *(("w4a4_kv4", 4, at) for at in ("read", "commit")),
)
BLOCK_DIFFUSION = Definition(
    "block_diffusion",
    "Block diffusion and a mixture of experts, W4A4, keys and values on 16, 8 and 4 bits, rounded at read or at commit",
    (
        RowOf("full precision", FULL),
        *(
            RowOf(
                f"{label}, KV {kv}" + (" at commit" if at == "commit" else ""),
                {"method.name": name, "bits.name": bits, "bits.attention.v": kv, "bits.attention.kv_at": at},
            )
            for bits, kv, at in _KV
            for label, name in _KV_METHODS.items()
        ),
    ),
    against="QuaRot, KV 16",
)
TABLES = {
    definition.name: definition
    for definition in (
        Definition(
            "table1_main",
            "W4A4: all methods, all tasks (the paper's table 1)",
            (
                FULL_ROW,
                _row("RTN", "rtn", "w4a4", method="RTN"),
                _row("SmoothQuant", "smoothquant", "w4a4"),
                _row("AWQ", "awq", "w4a4", method="AWQ"),
                _row("DLLMQuant+", "dllmquant_plus", "w4a4", method="DLLMQuant+"),
                _row("QuaRot", "quarot", "w4a4", method="QuaRot"),
                _row("DLLMQuant++", "dllmquant_plus_plus", "w4a4", method="DLLMQuant++"),
                _row("FlatQuant", "flatquant", "w4a4"),
                _row("FreeAct", "freeact", "w4a4"),
                _row("STaR-Quant", "star_quant", "w4a4", 16, method="STaR-Quant"),
                _row("star_quant_plus (ours)", "star_quant_plus", "w4a4"),
            ),
            PAPER / "table1_w4a4.csv",
            "STaR-Quant",
        ),
        Definition(
            "table2_ablation",
            "W4A4: STaR-Quant without its parts (the paper's table 2)",
            (
                ABLATION_FULL,
                _row("without TAC", "star_quant_no_tac", "w4a4", variant="without TAC"),
                _row("without SGAT", "star_quant_no_sgat", "w4a4", 16, variant="without SGAT"),
                _row("STaR-Quant", "star_quant", "w4a4", 16, variant="STaR-Quant"),
            ),
            PAPER / "table2_ablation.csv",
            "STaR-Quant",
        ),
        Definition(
            "table3_tac_block_size",
            "W4A4: TAC's block size g (the paper's table 3)",
            (
                RowOf("full precision", FULL),
                *(_row(f"g = {g}", "star_quant", "w4a4", g, block_size=g) for g in (4, 8, 16, 32, 64)),
            ),
            PAPER / "table3_tac_block_size.csv",
            "g = 16",
        ),
        Definition(
            "table5_w8a8",
            "W8A8 (the paper's table 5)",
            (
                FULL_ROW,
                _row("RTN", "rtn", "w8a8"),
                _row("QuaRot", "quarot", "w8a8"),
                _row("STaR-Quant", "star_quant", "w8a8", 16, method="STaR-Quant"),
                _row("star_quant_plus (ours)", "star_quant_plus", "w8a8"),
            ),
            PAPER / "table5_w8a8.csv",
            "STaR-Quant",
        ),
        BLOCK_DIFFUSION,
    )
}

_SOFTMAX_V = {"bits.attention.v": 4, "bits.attention.p": 4}
TRAJECTORIES = Definition(
    "figure3_trajectory",
    "Hidden-state error along the denoising trajectory (the paper's figure 3)",
    (
        RowOf("no TAC", {"method.name": "star_quant_no_tac", "bits.weights.bits": 4, **_SOFTMAX_V}),
        RowOf("TAC", {"method.name": "star_quant", "bits.weights.bits": 4, "method.tac.block_size": 16, **_SOFTMAX_V}),
        RowOf(
            "no TAC, softmax.V at 16 bits",
            {"method.name": "star_quant_no_tac", "bits.weights.bits": 4, "bits.attention.v": 16},
        ),
    ),
    draw="trajectory",
)
#: Figures of records; figure 1 is drawn from reports of `stage=inspect`.
FIGURES = {
    TRAJECTORIES.name: TRAJECTORIES,
}
ACTIVATIONS = "figure1_activations"

_STAR = {"method.transform.steps": 80}
_PLUS = {
    **_STAR,
    "method.transform.channel_scales": True,
    "method.transform.balance": True,
    "method.fisher.hessian": False,
}
SMOL_MAIN = Definition(
    "smol_main",
    "A real LLM of 135 M parameters (smol): every method against full precision",
    tuple(
        RowOf(label, {"model.name": "smol", "tasks.names": [], "method.name": name, **more})
        for label, name, more in (
            ("RTN", "rtn", {}),
            ("SmoothQuant", "smoothquant", {}),
            ("AWQ", "awq", {}),
            ("GPTQ", "gptq", {}),
            ("DLLMQuant+", "dllmquant_plus", {}),
            ("QuaRot", "quarot", {}),
            ("DLLMQuant++", "dllmquant_plus_plus", {}),
            ("FlatQuant", "flatquant", {}),
            ("FreeAct", "freeact", {}),
            ("STaR-Quant", "star_quant", _STAR),
            ("STaR-Quant without SGAT", "star_quant_no_sgat", _STAR),
            ("STaR-Quant without TAC", "star_quant_no_tac", _STAR),
            ("star_quant_plus (ours)", "star_quant_plus", _PLUS),
        )
    ),
    against="QuaRot",
    also_against=("STaR-Quant", "star_quant_plus (ours)"),
)
#: star_quant_plus as it is, then what each row changes.
_WHOLE = {
    "model.name": "smol",
    "tasks.names": [],
    "method.name": "star_quant_plus",
    **_PLUS,
    "bits.activations.symmetric": False,
    "method.tac.enabled": True,
    "method.weights.name": "gptq",
}
PLUS_ABLATION = Definition(
    "plus_ablation",
    "star_quant_plus on smol without each of its parts",
    _variants(
        _WHOLE,
        {
            "star_quant_plus": {},
            "symmetric inputs": {"bits.activations.symmetric": True},
            "without the balancing map": {"method.transform.balance": False},
            "without channel scales": {"method.transform.channel_scales": False},
            "with Fisher weights": {"method.fisher.hessian": True},
            "without TAC": {"method.tac.enabled": False},
            "without GPTQ": {"method.weights.name": "rtn"},
        },
    ),
    against="star_quant_plus",
    grids=True,
)
#: What QuaRot (GPTQ) is calibrated on, then what each row changes.
_SEEN = {
    "model.name": "smol",
    "model.dtype": "bfloat16",
    "tasks.names": [],
    "bits.name": "w4a4",
    "method.name": "quarot",
    "calibration.source.kind": "smol",
    "calibration.source.segments": 128,
    "calibration.states.sampler": "uniform",
    "calibration.inputs": "full_precision",
}
SMOL_CALIBRATION = Definition(
    "smol_calibration",
    "QuaRot on smol, W4A4, by what it is calibrated on",
    _variants(
        _SEEN,
        {
            "128 segments of text and tasks": {},
            "natural text alone": {"calibration.source.kind": "smol_text"},
            "tasks alone": {"calibration.source.kind": "smol_tasks"},
            "32 segments": {"calibration.source.segments": 32},
            "512 segments": {"calibration.source.segments": 512},
            "unmasked text": {"calibration.states.sampler": "clean"},
            "fed quantized weights": {"calibration.inputs": "quantized_weights"},
            "fed the quantized model": {"calibration.inputs": "quantized"},
        },
    ),
    against="128 segments of text and tasks",
)
#: Tables over rotation seeds, with a figure beside them.
SEED_TABLES = {definition.name: definition for definition in (SMOL_MAIN, PLUS_ABLATION, SMOL_CALIBRATION)}
