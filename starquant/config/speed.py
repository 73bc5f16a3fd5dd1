"""What an evaluation trades for speed: by default nothing. Plain validated data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from starquant.config.fields import Name, Ratio, Spec, Tokens
from starquant.config.protocol import TaskProtocol


class SpeedSpec(Spec):
    """Shortcuts of evaluation. Those that approximate are named in records and tables and never mixed with exact runs.

    Attributes:
        compile: torch.compile of the blocks; changes scores by rounding, by how much is measured and recorded.
        kv_cache: keys and values kept while a block is filled: of what lies in front of it (prefix), of what follows as
            well (dual), after Fast-dLLM (arXiv 2505.22618).
        confidence_threshold: commit every masked token whose probability reaches it, one at least, instead of the
            sampler's number a step (the same paper's parallel decoding).
        block_length: of generated answers under these two; null for the sampler's own.
        mc_num: at most so many Monte-Carlo draws a likelihood; the standard error that the rest costs is recorded.
    """

    name: Name = "exact"
    compile: bool = False
    kv_cache: Literal["none", "prefix", "dual"] = "none"
    confidence_threshold: Ratio | None = None
    block_length: Tokens | None = None
    mc_num: Annotated[int, Field(ge=2, le=100_000)] | None = None

    @model_validator(mode="after")
    def _validate_combination(self) -> SpeedSpec:
        if self.block_length is not None and not self.generation:
            raise ValueError("speed.block_length: is read with kv_cache or confidence_threshold only")
        if self.mc_num is not None and self.mc_num % 2:
            raise ValueError(
                f"speed.mc_num: got {self.mc_num}, allowed: an even number (two halves give the standard error)"
            )
        if self.compile and self.kv_cache != "none":
            raise ValueError("speed.compile: got true, but kv_cache changes shapes all the time; allowed: one of them")
        return self

    @property
    def generation(self) -> bool:
        """Whether answers are generated approximately."""
        return self.kv_cache != "none" or self.confidence_threshold is not None

    @property
    def approximations(self) -> list[str]:
        """Return what is not exact, in words; empty for an exact evaluation."""
        words = [f"{self.kv_cache} KV cache"] if self.kv_cache != "none" else []
        words += [f"confidence threshold {self.confidence_threshold:g}"] if self.confidence_threshold else []
        words += [f"blocks of {self.block_length}"] if self.block_length else []
        return words + ([f"at most {self.mc_num} draws"] if self.mc_num else [])

    def validate_protocols(self, protocols: Mapping[str, TaskProtocol]) -> None:
        """Judge the protocols of generated answers.

        Raises:
            ValueError: answers that do not consist of whole blocks, a sampler that commits by chance.
        """
        for name, protocol in protocols.items() if self.generation else ():
            sampler = protocol.sampler
            if sampler is None:
                continue
            if self.block_length is not None and sampler.answer_length % self.block_length:
                raise ValueError(
                    f"speed.block_length: got {self.block_length}, must divide the {sampler.answer_length} tokens of "
                    f"{name}'s answers"
                )
            key = sampler.commits_by_chance
            if key is not None:
                raise ValueError(
                    f"speed.kv_cache, speed.confidence_threshold: model.protocol.{name}.sampler.{key} is "
                    f"{getattr(sampler, key)!r}, which commits tokens by chance; allowed: an exact evaluation, or "
                    "another sampler"
                )

    def applied(self, protocols: Mapping[str, TaskProtocol]) -> SpeedSpec:
        """Return what of it changes something for these tasks."""
        changes: dict[str, object] = {}
        if not any(protocol.sampler is not None for protocol in protocols.values()):
            changes |= {"kv_cache": "none", "confidence_threshold": None, "block_length": None}
        draws = max((protocol.mc_num or 0 for protocol in protocols.values()), default=0)
        if self.mc_num is not None and draws <= self.mc_num:
            changes["mc_num"] = None
        return self.model_copy(update=changes)

    @property
    def is_exact(self) -> bool:
        """Whether nothing is changed: the name alone says nothing."""
        return self.model_copy(update={"name": "exact"}) == SpeedSpec()
