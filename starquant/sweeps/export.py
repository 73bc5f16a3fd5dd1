"""`starquant export MODEL DIR [KEY=VALUE ...]`: a run that ends with the quantized model as a folder.

    starquant export tiny tiny-w4a4                                   W4A4, STaR-Quant
    starquant export llada llada-w4a8 bits=w4a8 method=quarot runtime.device=cuda
    starquant export llada mine-w4a4 model.path=CHECKPOINT            a checkpoint of your own

It is `run` with model=MODEL export.dir=DIR. Unless tasks are named, none is scored, and the record says how closely
the quantized model follows full precision (tasks=fidelity).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from starquant.errors import ConfigError, nearest, one_line_errors
from starquant.sweeps.catalogue.reading import options
from starquant.sweeps.overrides import quoted

USAGE = "usage: starquant export MODEL DIR [KEY=VALUE ...]"


def words_of(arguments: Sequence[str]) -> list[str]:
    """Return the words of the run that an export is; raises ConfigError for a model that is none."""
    plain = [word for word in arguments if "=" not in word and not word.startswith(("-", "~"))]
    rest = [word for word in arguments if word not in plain]
    if len(plain) != 2 or any(word in ("-m", "--multirun") for word in rest):
        raise ConfigError(f"export: got {' '.join(plain) or 'nothing'}; {USAGE}")
    model, folder = plain
    models = options("model")
    if model not in models:
        own = f"a checkpoint of your own: export llada {folder} model.path={model}"
        raise ConfigError(f"model: got '{model}', allowed: {', '.join(models)}.{nearest(model, models)} ({own})")
    scored = any(word.lstrip("+~").startswith("tasks") for word in rest)
    return [f"model={model}", quoted("export.dir", folder), *([] if scored else ["tasks=fidelity"]), *rest]


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run and export; returns 2 after bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or {"-h", "--help"} & {*words}:
        print(f"{__doc__}\n{USAGE}")
        return 0
    from starquant.sweeps.command_line import main as run

    return run(words_of(words))


if __name__ == "__main__":
    sys.exit(main())
