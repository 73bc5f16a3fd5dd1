"""What every sampler is: settings, and which tokens they commit at each denoising step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from starquant.diffusion.predictor import Cache, MaskPredictor
from starquant.errors import ConfigError

OnStep = Callable[[int, Tensor, Tensor | None], None]
Positions = tuple[Tensor, Tensor]


@dataclass
class DenoisingState:
    """A batch being generated.

    Attributes:
        ids_BL: prompt and answer, changed in place.
        prompt_length: columns of the prompt (padding included); the answer follows.
        visible_BL: False on padding, None without.
        generators: one a row.
        on_step: called after every step with (step, ids, rows that took it [B]; None where all did).
        prompt_BL: what classifier-free guidance hides: tokens that are no [MASK] before the first step.
    """

    ids_BL: Tensor
    prompt_length: int
    visible_BL: Tensor | None
    generators: list[torch.Generator]
    on_step: OnStep | None = None
    prompt_BL: Tensor | None = None


class Sampler(ABC):
    """Fills the masked positions of a batch; holds settings only.

    Random draws come from one generator a row, so that a row's tokens do not depend on the rest of its batch.
    """

    #: In configuration (`config.samplers`).
    name: ClassVar[str]
    steps: int

    @classmethod
    @abstractmethod
    def of_length(
        cls, length: int, steps: int | None = None, block_length: int | None = None, temperature: float = 0.0
    ) -> Sampler:
        """Return a sampler of answers of `length` tokens.

        Args:
            length: of the answer.
            steps: denoising steps; None for one a token.
            block_length: tokens of a block; None for the whole answer.
            temperature: 0 is greedy.

        Raises:
            ConfigError: settings that the family does not have, or that do not go together.
        """

    @property
    @abstractmethod
    def answer_length(self) -> int:
        """Tokens that `generate` appends to the prompt."""

    @property
    def branches(self) -> int:
        """Rows of a forward pass for each sequence: guidance runs two."""
        return 1

    @property
    def own_block_length(self) -> int:
        """Tokens that are filled before any behind them."""
        return self.answer_length

    @property
    @abstractmethod
    def draws(self) -> bool:
        """Whether a step draws random numbers even where it commits nothing."""

    @property
    @abstractmethod
    def commits_by_chance(self) -> bool:
        """Whether chance, not confidence, decides which positions are committed."""

    def reach(self, answer_BG: Tensor, prompt_B: Tensor, mask_id: int) -> Tensor | None:
        """Return where the next step from a state predicts tokens, [B, G]; None for wherever it is masked.

        Args:
            answer_BG: of the state.
            prompt_B: tokens of each row's prompt.
            mask_id: id of [MASK].
        """
        return None

    def by_probability(self) -> Sampler:
        """Return the same sampler with the tokens' probabilities as its confidences."""
        return self

    @abstractmethod
    def denoise(self, predict: MaskPredictor, state: DenoisingState) -> None:
        """Fill the answer."""

    @abstractmethod
    def commits(self, step_B: Tensor, masked_B: Tensor) -> Tensor:
        """Return how many of its masked tokens each row commits at its step, of an answer masked as a whole."""

    def idle(self, step: int, masked: int) -> bool:
        """Return whether a step commits nothing and draws nothing: it need not be computed."""
        return not self.draws and step < self.steps and int(self.commits(torch.tensor(step), torch.tensor(masked))) == 0

    @abstractmethod
    def advance(self, predict: MaskPredictor, state: DenoisingState, step: int | Tensor, commit_B: Tensor) -> None:
        """Take one step from any state: commit `commit_B` tokens of each row.

        `step` is one for all rows, or one a row [B].
        """

    @abstractmethod
    def candidates(
        self, predict: MaskPredictor, state: DenoisingState, at: Positions, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (token [N], confidence [N]) for masked positions."""


def validate_positive(sampler: object, *names: str) -> None:
    """Raise ConfigError for the first of some settings that is below 1."""
    for name in names:
        if getattr(sampler, name) < 1:
            raise ConfigError(f"{name}: got {getattr(sampler, name)}, allowed: 1 or more")


def validate_not_negative(sampler: object, *names: str) -> None:
    """Raise ConfigError for the first of some settings that is below 0."""
    for name in names:
        if getattr(sampler, name) < 0:
            raise ConfigError(f"{name}: got {getattr(sampler, name)}, allowed: 0 or more")
