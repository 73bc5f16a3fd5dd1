"""lm-eval's own command line, with the model class `starquant` registered."""

import sys

from lm_eval.__main__ import cli_evaluate

from starquant.errors import StarquantError
from starquant.evaluation import command_line as _registers  # noqa: F401

if __name__ == "__main__":
    try:
        cli_evaluate()
    except StarquantError as error:
        sys.exit(f"error: {error}")
