"""Chat templates for lm-eval: a task's prompt and its few-shot examples as the turns of a conversation."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from starquant.errors import ConfigError
from starquant.models.tokenizer import render_chat, validate_chat_template


class Conversations:
    """What lm-eval asks of a model class where chat templates are applied.

    Attributes:
        tokenizer: whose template it is.
        templated: whether prompts come from the template, which holds every special token that belongs there.
    """

    tokenizer: PreTrainedTokenizerBase
    templated: bool

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the checkpoint's template makes it; raises CheckpointError where it cannot."""
        self.templated = True
        return render_chat(self.tokenizer, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the text of the template, for lm-eval's results; empty for none.

        Raises:
            ConfigError: a template by name, or a checkpoint without one.
        """
        self.templated = bool(chat_template)
        if not chat_template:
            return ""
        if isinstance(chat_template, str):
            raise ConfigError(f"--apply_chat_template: got '{chat_template}', allowed: no name, the checkpoint's own")
        validate_chat_template(self.tokenizer, "--apply_chat_template")
        return str(self.tokenizer.get_chat_template())
