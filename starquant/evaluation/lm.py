"""One lm-eval model class over every masked-diffusion family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from transformers import PreTrainedTokenizerBase

from starquant.config.protocol import TaskProtocol
from starquant.config.speed import SpeedSpec
from starquant.diffusion import (
    BatchSize,
    LikelihoodEstimator,
    MaskPredictor,
    Sampler,
    ScoreRequest,
    generate_approximately,
    generate_many,
)
from starquant.diffusion.continuous_batching import Settled
from starquant.diffusion.generation import end_of_text
from starquant.diffusion.special_tokens import cut_left, eos_token_id
from starquant.errors import CheckpointError, ConfigError
from starquant.evaluation.conversations import Conversations
from starquant.evaluation.prompts import CutItems, Item, item_of, validate_unmasked
from starquant.evaluation.responses import ResponseLog
from starquant.models import family_of
from starquant.models.base import MaskedDiffusionModel
from starquant.session.processes import ALONE, Processes
from starquant.session.progress import SILENT, Progress

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

EXACT = SpeedSpec()
#: Requests of a task that are answered compiled and not, to measure the difference.
COMPARED = 8


def _both_ways(answer: Callable[[], dict[int, T]]) -> tuple[dict[int, T], dict[int, T]]:
    """Return what a compiled model answers, and the same model as it is written."""
    compiled = answer()
    with torch.compiler.set_stance("force_eager"):
        return compiled, answer()


def _never(index: int, known: list[int]) -> bool:
    return False


class DiffusionLM(Conversations, LM):
    """Answer lm-eval's requests with a masked-diffusion model.

    Args:
        model: any model of `starquant.models`, quantized or not.
        tokenizer: its tokenizer.
        batch_size: sequences a forward pass, "auto" for what memory holds; changes scores by rounding only.
        seed: of Monte-Carlo draws and sampling, combined with each request's tokens.
        progress: draws bars.
        together: the processes that share the items.
        speed: shortcuts of evaluation.
        predict: another engine's predictions; None for the model's own.

    `protocol`, `responses`, `templated` and `task` (shown in progress bars) are set for each task before it is run.
    """

    def __init__(
        self,
        model: MaskedDiffusionModel,
        tokenizer: PreTrainedTokenizerBase,
        protocol: TaskProtocol | None = None,
        batch_size: int | str = "auto",
        seed: int = 0,
        progress: Progress = SILENT,
        together: Processes = ALONE,
        speed: SpeedSpec = EXACT,
        predict: MaskPredictor | None = None,
    ) -> None:
        super().__init__()
        self.together, self._rank, self._world_size = together, together.rank, together.world
        self.model, self.tokenizer, self.protocol, self.templated = model, tokenizer, protocol, False
        self.family = family_of(model)
        self.batch_size, self.seed, self.progress = BatchSize.of(batch_size, model), seed, progress
        self.responses, self.speed, self.task = ResponseLog(None), speed, ""
        #: What shortcuts cost in the task that was run last: metric to value.
        self.costs: dict[str, float] = {}
        #: Items of which the model sees a part, since it was last emptied; those of this process.
        self.cut = CutItems()
        self.predict, self._device = MaskPredictor(model) if predict is None else predict, model.device

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's request caches."""
        return str(self.tokenizer.name_or_path)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a number of every process."""
        return self.together.gather_numbers(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return an object of every process to one of them, None to the others."""
        return self.together.gather_objects(obj, dst)

    def barrier(self) -> None:
        """Wait for every process."""
        self.together.wait()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, False) for each (context, continuation).

        Whether greedy decoding would give the continuation is not computed: no task's metric reads it, and it
        would cost one generation a request.

        Raises:
            ConfigError: the task's protocol has no mc_num.
            DataError: [MASK] in a text.
        """
        protocol = self._protocol("mc_num")
        assert protocol.mc_num is not None
        pairs: list[tuple[str, str]] = [(str(r.args[0]), str(r.args[1])) for r in requests]
        keys = [self.responses.key("loglikelihood", list(pair)) for pair in pairs]
        noise = self.family.noise
        few = self.speed.mc_num is not None and self.speed.mc_num < protocol.mc_num
        draws = self.speed.mc_num // 2 if few and self.speed.mc_num else protocol.mc_num
        most = self.speed.mc_num if few else None
        estimator = LikelihoodEstimator(noise, draws, protocol.cfg_scale, self.batch_size, self.seed, most)
        todo = self._unanswered(keys)
        bar = self._bar(keys, todo, disable_tqdm)
        whole = self._score_requests(requests, noise.append_eos)
        scored = [whole[i] for i in todo]
        for index, estimates in self._estimates(estimator, scored, 2 if few else 1):
            if not all(map(math.isfinite, estimates)):
                raise CheckpointError(f"{self.task}: a log-likelihood is {estimates[0]}; the model's weights overflow")
            self.responses.add(keys[todo[index]], estimates if few else estimates[0])
            bar.update()
        bar.close()
        answers = [self.responses[key] for key in keys]
        halves = [answer for answer in answers if isinstance(answer, list)]
        squares = sum((a - b) ** 2 / 4 for a, b in halves)
        self.costs = {"mc_stderr": math.sqrt(squares / len(answers))} if few and answers else {}
        if self.speed.compile and pairs:
            first = whole[:COMPARED]
            compiled, eager = _both_ways(lambda: dict(estimator.scores(self.predict, first)))
            self.costs["compile_difference"] = max(abs(compiled[i] - eager[i]) for i in compiled)
        return [(sum(a) / len(a) if isinstance(a, list) else float(a), False) for a in answers]

    def _estimates(
        self, estimator: LikelihoodEstimator, requests: Sequence[ScoreRequest], parts: int
    ) -> Iterator[tuple[int, list[float]]]:
        """Yield (index of the request, estimates of independent draws, `parts` of them) as requests are finished."""
        repeated = [replace(request, repeat=part) for request in requests for part in range(parts)]
        unfinished: dict[int, list[float]] = {}
        for index, value in estimator.scores(self.predict, repeated):
            estimates = unfinished.setdefault(index // parts, [])
            estimates.append(value)
            if len(estimates) == parts:
                yield index // parts, unfinished.pop(index // parts)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refuse: masked-diffusion models define no left-to-right perplexity."""
        raise ConfigError("tasks.names: perplexity tasks (loglikelihood_rolling) are not defined for masked diffusion")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each (context, generation arguments), cut at end-of-text and the stop strings.

        Lengths and temperature come from the task's protocol, not from the stock task's arguments.

        Raises:
            ConfigError: the task's protocol has no sampler, or the other family's.
            DataError: [MASK] in a prompt.
        """
        sampler = self._sampler()
        contexts = [str(r.args[0]) for r in requests]
        stops = [_stop_strings(r.args[1]) for r in requests]
        keys = [self.responses.key("generate_until", [c, s]) for c, s in zip(contexts, stops, strict=True)]
        todo = self._unanswered(keys)
        bar = self._bar(keys, todo, disable_tqdm)
        prompts = self._prompts(requests, sampler.answer_length)

        def settled(index: int, known: list[int]) -> bool:
            return self._settled(known, stops[todo[index]])

        for index, answer in self._answers([prompts[i] for i in todo], sampler, settled):
            self.responses.add(keys[todo[index]], self._text(answer, stops[todo[index]]))
            bar.update()
        bar.close()
        self.costs = {}
        if self.speed.compile and prompts:

            def texts() -> dict[int, str]:
                some = self._answers(prompts[:COMPARED], sampler, _never)
                return {i: self._text(answer, stops[i]) for i, answer in some}

            compiled, eager = _both_ways(texts)
            self.costs["compile_flips"] = sum(compiled[i] != eager[i] for i in compiled) / len(compiled)
        return [str(self.responses[key]) for key in keys]

    def _prompts(self, requests: Sequence[Instance], answer_length: int) -> list[list[int]]:
        """Return the prompts' ids, of those that leave the answer no room the end; counts these."""
        room = (context := self.predict.config.context_length) - answer_length
        if room < 1:
            raise ConfigError(f"model.protocol: the answer's {answer_length} tokens do not fit the model's {context}")
        texts = self._encode([str(r.args[0]) for r in requests])
        items = [item_of(request, self.task) for request in requests]
        validate_unmasked(items, texts, self.model.mask_token_id, self.tokenizer.decode)
        for item, ids in zip(items, texts, strict=True):
            self.cut.add(item, cut_prompts=len(ids) > room)
        return [cut_left(ids, room, self._bos) for ids in texts]

    def _answers(
        self, prompts: Sequence[Sequence[int]], sampler: Sampler, settled: Settled
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield (index of the prompt, answer tokens), by the shortcuts asked for."""
        how: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed, "settled": settled}
        if not self.speed.generation:
            return generate_many(self.predict, prompts, sampler, **how)
        return generate_approximately(self.predict, prompts, sampler, self.speed, **how)

    def _protocol(self, needs: str) -> TaskProtocol:
        if self.protocol is None or getattr(self.protocol, needs) is None:
            kind = "likelihood" if needs == "mc_num" else "generation"
            raise ConfigError(f"model.protocol: a {kind} task needs {needs}")
        return self.protocol

    def _sampler(self) -> Sampler:
        settings = self._protocol("sampler").sampler
        assert settings is not None
        return self.family.make_sampler(settings, "model.protocol")

    def _unanswered(self, keys: Sequence[str]) -> list[int]:
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        return [i for i, key in enumerate(keys) if key not in self.responses and first[key] == i]

    def _bar(self, keys: Sequence[str], todo: Sequence[int], disable: bool) -> tqdm[Any]:
        distinct, progress = len(set(keys)), SILENT if disable else self.progress
        done = distinct - len(todo)
        return progress.bar(None, self.task, "request", total=distinct, initial=done, counted=True)

    @property
    def _bos(self) -> int | None:
        """What is put in front of every prompt; None for nothing."""
        return None if self.templated else self.family.bos_token_id(self.tokenizer)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, all in one call, each distinct text once."""
        distinct, head = list(dict.fromkeys(texts)), [] if self._bos is None else [self._bos]
        ids = self.tokenizer(distinct, add_special_tokens=False)["input_ids"] if distinct else []
        ids_of = {text: [*head, *one] for text, one in zip(distinct, ids, strict=True)}
        return [ids_of[text] for text in texts]

    def _score_requests(self, requests: Sequence[Instance], append_eos: bool) -> list[ScoreRequest]:
        """Tokenize as lm-eval does: trailing spaces of the context belong to the continuation."""
        pairs = [(str(r.args[0]), str(r.args[1])) for r in requests]
        prompts = self._encode([context.rstrip() for context, _ in pairs])
        wholes = self._encode([context + continuation for context, continuation in pairs])
        items = [item_of(request, self.task) for request in requests]
        for texts in (prompts, wholes):
            validate_unmasked(items, texts, self.model.mask_token_id, self.tokenizer.decode)
        return [self._score_request(*parts, append_eos) for parts in zip(items, prompts, wholes, strict=True)]

    def _score_request(self, item: Item, prompt: list[int], whole: list[int], append_eos: bool) -> ScoreRequest:
        """Return a request that fits the context, its target whole where that fits by itself; counts what does not."""
        target = whole[len(prompt) :]
        suffix = (eos_token_id(self.model.config),) if append_eos else ()
        limit = self.predict.config.context_length - len(suffix)
        fitting = target[:limit]
        room = limit - len(fitting)
        self.cut.add(item, cut_prompts=len(prompt) > room, cut_answers=len(fitting) < len(target))
        return ScoreRequest(tuple(cut_left(prompt, room, self._bos)), tuple(fitting), suffix)

    def _settled(self, known: list[int], stops: Sequence[str]) -> bool:
        """Return whether the text is settled by the tokens known: they hold an end, or a stop string.

        Texts are cut at one stop string after the other, so that what follows the first one found must be long
        enough to show every other that begins before its end.
        """
        if end_of_text(self.model.config, known) < len(known):
            return True
        text = str(self.tokenizer.decode(known, skip_special_tokens=True)) if stops else ""
        starts = [text.find(stop) for stop in stops if stop in text]
        return bool(starts) and len(text) - min(starts) >= 2 * max(map(len, stops))

    def _text(self, answer: list[int], stops: Sequence[str]) -> str:
        text = str(self.tokenizer.decode(answer[: end_of_text(self.model.config, answer)], skip_special_tokens=True))
        for stop in stops:
            text = text.split(stop)[0]
        return text


def _stop_strings(gen_kwargs: dict[str, Any]) -> list[str]:
    until = gen_kwargs.get("until") or []
    return [s for s in ([until] if isinstance(until, str) else until) if s]
