"""The commands of `starquant`, as data: what runs each, and what it does."""

from __future__ import annotations

#: Command -> module whose `main(arguments)` returns an exit code, and what it does.
COMMANDS = {
    "run": (
        "starquant.sweeps.command_line",
        "quantize and score: run [-m] KEY=VALUE ... (the word `run` may be left out)",
    ),
    "export": (
        "starquant.sweeps.export",
        "quantize into a folder for from_pretrained: export MODEL DIR [KEY=VALUE ...]",
    ),
    "generate": ("starquant.packed.completion", "complete a prompt: generate MODEL PROMPT"),
    "tune": ("starquant.packed.tune", "measure a GPU's fastest launch settings for packed models: tune [DIR]"),
    "evaluate": ("starquant.evaluation.__main__", "lm-eval's command line with checkpoint folders of this project"),
    "status": ("starquant.sweeps.status", "where the cells of a sweep stand: status EXPERIMENT|-m [KEY=VALUE ...]"),
    "tables": ("starquant.reports.__main__", "tables and figures from records: tables NAME ..."),
    "report": (
        "starquant.reports.page.__main__",
        "records as one HTML page: report [EXPERIMENT|FOLDER] --out FILE.html",
    ),
    "compare": ("starquant.reports.paired", "two records, item by item, with intervals: compare A B"),
    "publish": ("starquant.reports.publish", "records in two Parquet files, small enough to commit: publish FROM TO"),
    "methods": ("starquant.sweeps.catalogue.methods", "what method=NAME may be: paper, bits, calibration, export"),
    "models": ("starquant.sweeps.catalogue.models", "what model=NAME may be, and what each is run with"),
    "tasks": ("starquant.sweeps.catalogue.tasks", "what tasks=NAME may be, and the tasks of each"),
    "completion": ("starquant.sweeps.completion", "words of commands, keys and options for a shell: completion bash"),
}
