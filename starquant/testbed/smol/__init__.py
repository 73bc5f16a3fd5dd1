"""SmolLM2-135M-Instruct turned into a masked-diffusion LLM: a real pretrained model as test-bed.

`base` fetches and reads the pretrained model, `delta` is what turns it into a masked-diffusion model, `build` merges
the two into a checkpoint folder; `tasks` generates and scores the items of its tasks; `training` trains a delta.
"""

from pathlib import Path

from starquant.testbed.items import Split

#: Task -> tokens that a generated answer has room for.
ANSWER_LENGTHS = {"sums": 56, "reading": 24, "lists": 32, "programs": 48}


def natural_text(split: Split) -> str:
    """Return natural text that was trained on, or held out: addresses of presidents (`natural/README.md`)."""
    return (Path(__file__).with_name("natural") / f"{split.value}.txt").read_text(encoding="utf-8")
