"""The runs of a sweep, judged by what they read before the first one is run: every checkpoint, device and text once.

A run alone is judged by itself, in the same words, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from starquant.calibration import segments
from starquant.config.calibration import SourceSpec
from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.errors import StarquantError
from starquant.models import load_tokenizer
from starquant.models.base import MaskedDiffusionModel
from starquant.models.checkpoint import Checkpoint
from starquant.models.loading import validate_checkpoint, validate_device, validate_hub
from starquant.models.validation import skeleton_of
from starquant.runs.inputs import read_texts
from starquant.runs.packed import with_bits_of
from starquant.runs.placement import on_disk
from starquant.session.devices import FREE, leased
from starquant.testbed.folders import testbed_folder

P = ParamSpec("P")
T = TypeVar("T")


class Judge:
    """Judges runs; what several of them share is looked at once.

    Args:
        here: whether they are run by this process, on the devices and in the memory that it sees.
        fetches: whether what lies on the hub may be looked at, where they are run here.
    """

    def __init__(self, here: bool, fetches: bool = True) -> None:
        self._here, self._fetches = here, here and fetches
        self._outcomes: dict[tuple[str, ...], Any] = {}

    def validate(self, spec: RunSpec) -> None:
        """Judge a run: device, checkpoint, data, tasks, method, text, memory.

        Of a checkpoint on the hub its configuration alone is fetched; weights are never read.

        Raises:
            StarquantError: what the run itself would be refused for.
        """
        spec = spec.canonical()
        if self._here:
            self._once(("device", spec.runtime.device), validate_device_here, spec.runtime.device)
        folder = _local_folder(spec)
        if folder is None:
            if self._fetches:
                hub = (str(spec.model.source), spec.model.revision)
                self._once(("hub", *map(str, hub)), validate_hub, *hub)
            self._validate_data(spec)
            return
        checkpoint, skeleton = self._once(("checkpoint", str(folder)), _read_checkpoint, folder)
        self._validate_data(spec)
        spec = with_bits_of(spec, checkpoint)
        if spec.export.dir is not None and spec.export.format == "gguf":
            from starquant.llama_cpp.architecture import validate_architecture

            self._once(("gguf", str(folder)), validate_architecture, skeleton)
        method = (spec.method.model_dump_json(), spec.bits.model_dump_json())
        self._once(("method", str(folder), *method), _validate_method, spec, skeleton)
        sources = [part.source for part in (spec.calibration, spec.fidelity) if part.source is not None]
        if sources and all(self._has(source, spec.tasks.data_dir) for source in sources):
            self._once(("texts", str(folder), *_texts_of(spec)), _validate_texts, spec, folder, skeleton)
        if self._here and spec.runtime.device != FREE:
            blocks = (spec.runtime.blocks, spec.runtime.device, spec.model.dtype, str(spec.quantizes))
            self._once(("blocks", str(folder), *blocks), on_disk, spec, checkpoint, spec.runtime.device)

    def _validate_data(self, spec: RunSpec) -> None:
        from starquant.evaluation import offline

        folder = spec.tasks.data_dir
        if folder is not None:
            key = ("data", folder, *sorted(spec.tasks.names))
            self._once(key, offline.validate_data, Path(folder), spec.tasks.names)
        for name, source in (("calibration", spec.calibration.source), ("fidelity", spec.fidelity.source)):
            if source is not None and self._has(source, folder):
                key = ("source", name, source.model_dump_json(), str(folder))
                self._once(key, segments.fingerprint, source, folder, f"{name}.source")

        if self._fetches and spec.is_scored and not spec.tasks.is_shipped:
            from starquant.evaluation import suites

            with suites.quiet(spec.debug.verbose):
                self._once(("tasks", spec.tasks.model_dump_json()), suites.validate_tasks, spec.tasks)

    def _has(self, source: SourceSpec, data_dir: str | None) -> bool:
        """Return whether the items of a source can be looked at: those of the hub where the run is."""
        return self._fetches or not segments.is_on_hub(source, data_dir)

    def _once(self, key: tuple[str, ...], work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `work` returns for a key, or raise the error of the user that it has raised."""
        if key not in self._outcomes:
            try:
                self._outcomes[key] = work(*args, **kwargs)
            except StarquantError as error:
                self._outcomes[key] = error
        outcome = self._outcomes[key]
        if isinstance(outcome, StarquantError):
            raise outcome
        return outcome  # type: ignore[no-any-return]


def validate_device_here(device: str) -> None:
    """Judge a device, or whether one may be leased; raises ConfigError."""
    if device != FREE:
        validate_device(device)
    elif not torch.cuda.is_available():
        with leased(device):
            pass


def _local_folder(spec: RunSpec) -> Path | None:
    """Return the folder of a run's checkpoint, None of one that lies on the hub."""
    model = spec.model
    if model.source is None:
        assert model.seed is not None
        return testbed_folder(model.testbed, model.seed)
    return Path(model.source) if Path(model.source).is_dir() else None


def _read_checkpoint(folder: Path) -> tuple[Checkpoint, MaskedDiffusionModel]:
    checkpoint, family = validate_checkpoint(folder)
    skeleton = skeleton_of(checkpoint, family.model)
    assert isinstance(skeleton, MaskedDiffusionModel)
    return checkpoint, skeleton


def _validate_method(spec: RunSpec, skeleton: MaskedDiffusionModel) -> None:
    METHODS.build(spec.method).validate(skeleton, spec.bits)


def _texts_of(spec: RunSpec) -> tuple[str, ...]:
    """Return what the texts of a run depend on, but for seeds, which choose among them."""
    calibration, fidelity = spec.calibration, spec.fidelity
    parts = (calibration.source, calibration.states, fidelity.source, fidelity.states, spec.model.trajectory)
    return (str(spec.tasks.data_dir), *("" if part is None else part.model_dump_json() for part in parts))


def _validate_texts(spec: RunSpec, folder: Path, skeleton: MaskedDiffusionModel) -> None:
    read_texts(spec, load_tokenizer(folder), skeleton)
