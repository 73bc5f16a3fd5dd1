"""What tests of several files use; test modules import from here and never from each other."""

import pytest

# Their assertions explain themselves as those of test modules do.
ASSERTING = ("command_line", "methods", "models", "wandb_files")
pytest.register_assert_rewrite(*(f"tests.support.{name}" for name in ASSERTING))
