"""lm-eval's own command line, with the model class `starquant` registered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from starquant.errors import one_line_errors


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run lm-eval; it reads the command line of its process, so that other arguments need one of their own."""
    if arguments is not None and list(arguments) != sys.argv[1:]:
        return subprocess.run([sys.executable, "-m", "starquant.evaluation", *arguments]).returncode
    from lm_eval.__main__ import cli_evaluate

    from starquant.evaluation import command_line as _registers  # noqa: F401

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
