"""Complete a prompt with any checkpoint folder, packed or not, or a test-bed: `starquant generate tiny "a prompt"`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from starquant.errors import CommandParser, ConfigError, one_line_errors, one_of
from starquant.testbed.folders import checkpoint_of

#: Tokens, steps: beyond any model's context.
MOST = 100_000


def completion(folder: str, prompt: str, device: str, seed: int, settings: dict[str, Any]) -> str:
    """Return the text that follows a prompt, cut at end-of-text.

    Args:
        folder: of a checkpoint; "tiny", "smol", ... for a test-bed's model (`model.testbed`).
        prompt: text.
        device: torch device.
        seed: of sampling.
        settings: length, steps (None: one a token), block_length (None: the whole; LLaDA only), temperature, graphs,
            chat_template ("auto": the prompt is a user's turn in the checkpoint's template).

    Raises:
        StarquantError: a checkpoint that cannot be used, settings that do not go together.
    """
    import torch

    from starquant.diffusion import generate
    from starquant.diffusion.generation import end_of_text
    from starquant.diffusion.special_tokens import end_token_ids
    from starquant.models import family_of, load_model, load_tokenizer
    from starquant.models.cuda_graphs import replayed
    from starquant.models.tokenizer import render_chat, validate_chat_template

    for name in ("length", "steps", "block_length"):
        if settings[name] is not None and not 1 <= settings[name] <= MOST:
            raise ConfigError(f"--{name.replace('_', '-')}: got {settings[name]}, allowed: 1 to {MOST}")
    if settings["graphs"] and not device.startswith("cuda"):
        raise ConfigError(f"--graphs: got --device {device}, allowed: a GPU")
    if not 0.0 <= settings["temperature"] < math.inf:
        raise ConfigError(f"--temperature: got {settings['temperature']}, allowed: 0 or more")
    folder = checkpoint_of(folder)
    model, tokenizer = load_model(folder, device=device), load_tokenizer(folder)
    end_token_ids(model.config)  # refused here, where there is none
    length, family = settings["length"], family_of(model)
    sampler = family.sampler.of_length(length, settings["steps"], settings["block_length"], settings["temperature"])
    if length >= model.config.context_length:
        raise ConfigError(f"--length: got {length}, allowed: below the model's {model.config.context_length}")
    text, bos = prompt.encode(errors="replace").decode(), family.bos_token_id(tokenizer)
    if settings["chat_template"] == "auto":
        validate_chat_template(tokenizer, "--chat-template")
        text, bos = render_chat(tokenizer, [{"role": "user", "content": text}]), None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = ids if bos is None else [bos, *ids]
    if model.mask_token_id in ids:
        mask = tokenizer.decode([model.mask_token_id])
        raise ConfigError(
            f"prompt: it holds {mask!r}, which the tokenizer turns into the model's mask token (id "
            f"{model.mask_token_id}); allowed: text without it"
        )
    if not ids or len(ids) + length > model.config.context_length:
        allowed = model.config.context_length - length
        raise ConfigError(f"prompt: got {len(ids)} tokens, allowed: 1 to {allowed} beside an answer of {length}")
    with replayed(model, settings["graphs"]):
        answer = generate(model, torch.tensor([ids]), sampler, seed=seed)[0, len(ids) :].tolist()
    return str(tokenizer.decode(answer[: end_of_text(model.config, answer)], skip_special_tokens=True))


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
    print(completion(options["folder"], options["prompt"], options["device"], options["seed"], options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
