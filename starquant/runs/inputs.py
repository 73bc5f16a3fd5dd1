"""What a run reads: pinned by content, judged, and in memory once something has to be computed."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from starquant.calibration import segments
from starquant.calibration.batches import Segment
from starquant.calibration.masked_states import validate_per_segment
from starquant.config.calibration import SourceSpec
from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.diffusion.special_tokens import end_token_ids
from starquant.errors import CheckpointError, DataError
from starquant.models import family_of, load_tokenizer, resolve_folder
from starquant.models.base import MaskedDiffusionModel
from starquant.models.checkpoint import Checkpoint, fingerprint
from starquant.models.family import Family
from starquant.models.loading import read_model, validate_checkpoint
from starquant.models.tokenizer import validate_chat_template
from starquant.models.validation import DTYPES, skeleton_of
from starquant.runs.gguf import context_length, with_file
from starquant.runs.packed import choose_products, with_bits_of
from starquant.runs.placement import on_disk
from starquant.store.scratch import Scratch
from starquant.testbed.folders import testbed_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """The segments of a run, read before anything is computed; None where it needs none."""

    calibration: list[Segment] | None
    fidelity: list[Segment] | None


@dataclass(frozen=True)
class Loaded:
    """What a run reads, in memory.

    Attributes:
        model: at full precision until a method is applied to it.
        tokenizer: of the checkpoint.
        texts: to calibrate on and to be compared on.
        seconds: that reading the weights took.
    """

    model: MaskedDiffusionModel
    tokenizer: PreTrainedTokenizerBase
    texts: Texts
    seconds: float


@dataclass
class Inputs:
    """The inputs of a run, read once for full precision and the quantized model.

    Attributes:
        spec: pinned: digests of all content are in it.
        folder: of the checkpoint.
        checkpoint: as it was judged.
        family: of the checkpoint.
        loaded: once it has been read.
        scratch: where changed blocks are written, of a run whose blocks are on disk.
        judged: what `validated` returns, once it has.
        began: whether weights were asked for, which is where a run begins to compute.
    """

    spec: RunSpec
    folder: Path
    checkpoint: Checkpoint
    family: Family
    loaded: Loaded | None = None
    scratch: Scratch | None = None
    judged: tuple[PreTrainedTokenizerBase, MaskedDiffusionModel, Texts] | None = None
    began: bool = False

    def load(self, device: str, changed: Path | None = None) -> Loaded:
        """Return what is read; all but the weights is judged first.

        Args:
            device: of the model.
            changed: folder for changed blocks, where blocks stay on disk; None for one that goes with the run.

        Raises:
            StarquantError: a method that does not fit the model, text that cannot be used, weights that are not finite.
        """
        if self.loaded is None:
            self.loaded = self._read(device, changed)
        return self.loaded

    def validated(self) -> tuple[PreTrainedTokenizerBase, MaskedDiffusionModel, Texts]:
        """Return what is read but the weights, once: tokenizer, the model on the meta device, texts.

        Raises:
            StarquantError: a method that does not fit the model, text or a tokenizer that cannot be used.
        """
        if self.judged is None:
            self.judged = self._validated()
        return self.judged

    def _validated(self) -> tuple[PreTrainedTokenizerBase, MaskedDiffusionModel, Texts]:
        spec, tokenizer = self.spec, load_tokenizer(self.folder)
        skeleton = skeleton_of(self.checkpoint, self.family.model)
        assert isinstance(skeleton, MaskedDiffusionModel)
        METHODS.build(spec.method).validate(skeleton, spec.bits)
        if spec.model.chat_template == "auto" and spec.is_scored and spec.tasks.names:
            validate_chat_template(tokenizer, "model.chat_template")
        _validate_ends(spec, self.family, skeleton, self.folder)
        return tokenizer, skeleton, read_texts(spec, tokenizer, skeleton)

    def _read(self, device: str, changed: Path | None) -> Loaded:
        spec = self.spec
        tokenizer, _, texts = self.validated()
        if spec.is_packed:
            log.info("note: %s is packed: scored as it is, without full precision and fidelity beside it", self.folder)
        hollow = on_disk(spec, self.checkpoint, device)
        if hollow and changed is None:
            self.scratch = Scratch(Path(spec.paths.results))
            changed = self.scratch.folder
        began, self.began = time.perf_counter(), True
        model = read_model(
            self.checkpoint,
            self.family,
            DTYPES[spec.model.dtype],
            device,
            blocks_on_disk=hollow,
            changed=changed,
        )
        choose_products(model, spec)
        self._validate_unchanged()
        return Loaded(model, tokenizer, texts, time.perf_counter() - began)

    def _validate_unchanged(self) -> None:
        """Refuse files that were exchanged between the digest that the run is known by and reading."""
        spec = self.spec
        if fingerprint(self.folder) != spec.model.fingerprint:
            raise CheckpointError(f"{self.folder}: its files have changed since the run began; start it again")
        for name, part in (("calibration", spec.calibration), ("fidelity", spec.fidelity)):
            if part.source is None or segments.is_on_hub(part.source, spec.tasks.data_dir):
                continue
            if _digest_of_text(spec, name) != part.fingerprint:
                raise DataError(f"{name}.source: its file has changed since the run began; start it again")

    def free(self) -> None:
        """Give the model's memory back, and the disk that its changed blocks take."""
        self.loaded = None
        if self.scratch is not None:
            self.scratch.remove()
            self.scratch = None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def pin(spec: RunSpec) -> Inputs:
    """Put a specification into its one spelling and digests of its inputs' content into it.

    Raises:
        StarquantError: checkpoint or data files are missing or malformed.
    """
    from starquant.evaluation import offline

    spec = spec.canonical()
    if spec.model.source is None:
        assert spec.model.seed is not None
        folder = testbed_folder(spec.model.testbed, spec.model.seed)
    else:
        folder = resolve_folder(spec.model.source, spec.model.revision)
    checkpoint, family = validate_checkpoint(folder)
    spec = with_file(with_bits_of(spec, checkpoint), checkpoint)
    changes: dict[str, Any] = {"model": spec.model.model_copy(update={"fingerprint": fingerprint(folder)})}
    if spec.tasks.data_dir is not None:
        data = offline.validate_data(Path(spec.tasks.data_dir), spec.tasks.names)
        changes["tasks"] = spec.tasks.model_copy(update={"data_fingerprint": data})
    for name, part in (("calibration", spec.calibration), ("fidelity", spec.fidelity)):
        if part.source is not None:
            changes[name] = part.model_copy(update={"fingerprint": _digest_of_text(spec, name)})
    return Inputs(spec.model_copy(update=changes), folder, checkpoint, family)


def _digest_of_text(spec: RunSpec, name: str) -> str:
    source: SourceSpec = getattr(spec, name).source
    return segments.fingerprint(source, spec.tasks.data_dir, f"{name}.source")


def read_texts(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, model: MaskedDiffusionModel) -> Texts:
    """Read what a run calibrates on and is compared on, and judge it by the model (which may be on the meta device).

    Raises:
        StarquantError: text that cannot be used, a segment longer than the context, a trajectory that does not fit.
    """
    _validate_trajectory(spec, model)
    bos = family_of(model).bos_token_id(tokenizer)
    longest, data_dir = context_length(spec, model.config), spec.tasks.data_dir

    def read(source: SourceSpec | None, seed: int, where: str) -> list[Segment] | None:
        if source is None:
            return None
        how: dict[str, Any] = {"data_dir": data_dir, "where": where, "mask_id": model.mask_token_id}
        texts = segments.read_segments(source, tokenizer, longest, seed=seed, **how)
        return texts if bos is None else [_begin(segment, bos, longest) for segment in texts]

    return Texts(
        read(spec.calibration.source, spec.calibration.seed, "calibration.source"),
        # Seed 0: the same prompts whatever the run's seed, since methods are compared on them.
        read(spec.fidelity.source, 0, "fidelity.source"),
    )


def _validate_ends(spec: RunSpec, family: Family, model: MaskedDiffusionModel, folder: Path) -> None:
    """Refuse a checkpoint without end-of-text where answers end with it or likelihoods read it."""
    protocols = spec.protocols.values() if spec.is_scored else ()
    if any(protocol.sampler is not None or family.noise.append_eos for protocol in protocols):
        try:
            end_token_ids(model.config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}/{error}") from None


def _validate_trajectory(spec: RunSpec, model: MaskedDiffusionModel) -> None:
    """Judge the trajectory of calibration or fidelity by the model's context and its own steps."""
    states = spec.calibration.states
    recorded = spec.calibration.source is not None and states.sampler == "trajectory"
    if (spec.fidelity.source is None or spec.fidelity.states is not None) and not recorded:
        return
    sampler = family_of(model).make_sampler(spec.model.trajectory)
    segments.prompts_of([], sampler.answer_length, context_length(spec, model.config))
    if states.sampler == "trajectory":
        validate_per_segment(states.per_segment, sampler)


def _begin(segment: Segment, bos: int, limit: int) -> Segment:
    """Put BOS in front of a prompt, as the family's evaluation does (Dream)."""
    if not segment.prompt_length:
        return segment
    return replace(segment, ids=(bos, *segment.ids)[:limit], prompt_length=segment.prompt_length + 1)
