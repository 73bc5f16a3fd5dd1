"""lm-eval's own command line, with the model class `starquant` registered."""

from lm_eval.__main__ import cli_evaluate

from starquant.evaluation import command_line as _registers  # noqa: F401

if __name__ == "__main__":
    cli_evaluate()
