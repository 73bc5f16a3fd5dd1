"""lm-eval's own command line, with the model class `starquant` registered."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from starquant.errors import ConfigError, one_line_errors


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run lm-eval; it reads the command line of its process, so that other arguments need one of their own."""
    if arguments is not None and list(arguments) != sys.argv[1:]:
        return subprocess.run([sys.executable, "-m", "starquant.evaluation", *arguments]).returncode
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from starquant.evaluation import command_line as _registers  # noqa: F401

    setup_logging()
    command = HarnessCLI()
    options = command.parse_args()
    if getattr(options, "command", None) == "run":
        _validate_options(options)
    try:
        command.execute(options)
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise ConfigError(f"--tasks: {error}; allowed: lm-eval's own, and those of --include_path DIR") from None
    return 0


def _validate_options(options: argparse.Namespace) -> None:
    """Refuse options that the model class would not read; where no device is named, take a GPU if there is one."""
    import torch
    from lm_eval.config.evaluate_config import EvaluatorConfig

    try:
        in_file = EvaluatorConfig.load_yaml_config(options.config) if options.config else {}
        chosen = EvaluatorConfig.from_cli(options)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise ConfigError(f"lm-eval: {str(error).splitlines()[0]}") from None
    if chosen.model != "starquant":
        return
    if chosen.gen_kwargs:
        raise ConfigError(
            f"--gen_kwargs: got {', '.join(chosen.gen_kwargs)}, which masked diffusion does not read; allowed: "
            "gen_length, steps, block_length, temperature as --model_args"
        )
    if options.device is None and "device" not in in_file and "device" not in chosen.model_args:
        options.device = "cuda:0" if torch.cuda.is_available() else "cpu"  # lm-eval's default is cuda:0 anywhere


if __name__ == "__main__":
    sys.exit(main())
