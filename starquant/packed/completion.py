"""Complete a prompt with any checkpoint folder, packed or not, or a test-bed: `starquant generate tiny "a prompt"`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starquant.errors import CommandParser, ConfigError, one_line_errors, one_of
from starquant.testbed.folders import checkpoint_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from starquant.diffusion import Sampler
    from starquant.models.base import MaskedDiffusionModel

#: Tokens, steps: beyond any model's context.
MOST = 100_000


@dataclass(frozen=True)
class Settings:
    """How an answer is made.

    Attributes:
        length: of the answer, in tokens.
        steps: of denoising; None for one a token.
        block_length: None for the whole answer; LLaDA only.
        temperature: 0 is greedy.
        chat_template: "auto" makes the prompt a user's turn in the checkpoint's template, "none" leaves it as it is.
        device: torch device.
        seed: of sampling.
        graphs: passes are replayed as CUDA graphs.

    Raises:
        ConfigError: numbers out of range, graphs without a GPU; seen before a model is read.
    """

    length: int = 64
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    chat_template: str = "none"
    device: str = "cpu"
    seed: int = 0
    graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "steps", "block_length"):
            number = getattr(self, name)
            if number is not None and not 1 <= number <= MOST:
                raise ConfigError(f"--{name.replace('_', '-')}: got {number}, allowed: 1 to {MOST}")
        if self.graphs and not self.device.startswith("cuda"):
            raise ConfigError(f"--graphs: got --device {self.device}, allowed: a GPU")
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature: got {self.temperature}, allowed: 0 or more")


def completion(folder: str, prompt: str, settings: Settings) -> str:
    """Return the text that follows a prompt, cut at end-of-text.

    Args:
        folder: of a checkpoint; "tiny", "smol", ... for a test-bed's model (`model.testbed`).
        prompt: text.
        settings: of the answer.

    Raises:
        StarquantError: a checkpoint that cannot be used, settings that do not go together, a prompt that does not fit.
    """
    from starquant.diffusion.special_tokens import end_token_ids
    from starquant.models import family_of, load_model, load_tokenizer
    from starquant.models.loading import validate_device

    validate_device(settings.device, "--device")
    folder = checkpoint_of(folder)
    model, tokenizer = load_model(folder, device=settings.device), load_tokenizer(folder)
    end_token_ids(model.config)  # refused here, where there is none
    of_length = family_of(model).sampler.of_length
    sampler = of_length(settings.length, settings.steps, settings.block_length, settings.temperature)
    if settings.length >= model.config.context_length:
        raise ConfigError(f"--length: got {settings.length}, allowed: below the model's {model.config.context_length}")
    answer = _answer(model, _encoded(prompt, model, tokenizer, settings.chat_template), sampler, settings)
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def _encoded(
    prompt: str, model: MaskedDiffusionModel, tokenizer: PreTrainedTokenizerBase, chat_template: str
) -> list[int]:
    """Return the prompt's token ids, as the family's prompts begin; raises ConfigError for none, and for [MASK]."""
    from starquant.models import family_of
    from starquant.models.tokenizer import render_chat, validate_chat_template

    text, bos = prompt.encode(errors="replace").decode(), family_of(model).bos_token_id(tokenizer)
    if chat_template == "auto":
        validate_chat_template(tokenizer, "--chat-template")
        text, bos = render_chat(tokenizer, [{"role": "user", "content": text}]), None
    ids = [*([] if bos is None else [bos]), *tokenizer(text, add_special_tokens=False)["input_ids"]]
    if model.mask_token_id in ids:
        mask = tokenizer.decode([model.mask_token_id])
        raise ConfigError(
            f"prompt: it holds {mask!r}, which the tokenizer turns into the model's mask token (id "
            f"{model.mask_token_id}); allowed: text without it"
        )
    if not ids:
        raise ConfigError("prompt: got no tokens, allowed: 1 or more")
    return ids


def _answer(model: MaskedDiffusionModel, ids: list[int], sampler: Sampler, settings: Settings) -> list[int]:
    """Return the tokens of an answer up to its end; raises ConfigError where prompt and answer do not fit together."""
    import torch

    from starquant.diffusion import generate
    from starquant.diffusion.generation import end_of_text
    from starquant.models.cuda_graphs import replayed

    with replayed(model, settings.graphs):
        answer: list[int] = generate(model, torch.tensor([ids]), sampler, seed=settings.seed)[0, len(ids) :].tolist()
    return answer[: end_of_text(model.config, answer)]


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a completion; returns 2 after bad input."""
    parser = CommandParser(prog="starquant generate", description=__doc__)
    parser.add_argument("folder", metavar="model", help="checkpoint folder, hub id, or tiny, smol")
    parser.add_argument("prompt")
    parser.add_argument("--length", type=int, default=64, help="tokens of the answer (default 64)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: one a token)")
    parser.add_argument("--block-length", type=int, help="LLaDA: tokens of a block (default: the whole answer)")
    parser.add_argument(
        "--chat-template",
        type=one_of(("auto", "none")),
        default="none",
        help="auto: the prompt as a user's turn in the checkpoint's chat template (default none: raw text)",
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--graphs", action="store_true", help="replay passes as CUDA graphs")
    options = vars(parser.parse_args(arguments))
    folder, prompt = options.pop("folder"), options.pop("prompt")
    print(completion(folder, prompt, Settings(**options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
