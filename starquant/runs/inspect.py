"""What a run's model and calibration text look like inside, kept as a report (`stage=inspect`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from starquant.config.digest import digest_of
from starquant.config.run import RunSpec
from starquant.errors import ConfigError
from starquant.evaluation.activations import report
from starquant.runs.inputs import Loaded
from starquant.runs.stages import Say, calibration_states
from starquant.store import provenance
from starquant.store.files import set_aside, write_atomically
from starquant.store.locks import exclusive, lock_path


def inspect_activations(
    spec: RunSpec,
    results: Path,
    load: Callable[[], Loaded],
    device_name: str,
    say: Say,
    progress: bool,
) -> tuple[Path, bool]:
    """Return the report of the activations, and whether it was there already.

    Args:
        spec: pinned; its method chooses nothing but whether there is calibration text.
        results: folder of results.
        load: gives what is read, when the report has to be made.
        device_name: for its provenance.
        say: prints a line.
        progress: show progress bars.

    Raises:
        StarquantError: no calibration text, activations that are not finite, a folder that cannot be written.
    """
    whole, code = spec.calibration_identity(), provenance.code_digest(provenance.FITTING)
    identity = {"model": whole["model"], "calibration": whole["calibration"]}
    name = spec.model.name + ("" if spec.model.seed is None else f"-seed{spec.model.seed}")
    path = results / "activations" / f"{name}-{digest_of(identity)}.json"
    with exclusive(lock_path(results, "activations", path.stem), f"the activations of {name}"):
        if path.exists() and spec.reuse != "never" and _is_of(path, code):
            say(f"reused: {path} (reuse=never computes it again)")
            return path, True
        if spec.calibration.source is None:
            raise ConfigError(
                f"method: stage=inspect looks at calibration text, which '{spec.method.name}' reads none of; "
                "allowed: a method that calibrates, such as star_quant, and a calibration other than none"
            )
        loaded = load()
        states = calibration_states(spec, loaded.texts, loaded.get(), say, progress)
        assert states is not None
        source = provenance.collect(spec.runtime.device, device_name) | {"code_digest": code}
        told = {"name": name, "identity": identity, "provenance": source}
        found = report(loaded.get(), states, told, progress)
        write_atomically(path, json.dumps(found, indent=1) + "\n")
    return path, False


def _is_of(path: Path, code: str) -> bool:
    """Return whether a report is whole and of this code; a damaged one is set aside."""
    try:
        found: bool = json.loads(path.read_text(encoding="utf-8"))["provenance"]["code_digest"] == code
    except (OSError, ValueError, KeyError, TypeError) as error:
        set_aside(path, f"{path}: not readable as a report ({error})")
        return False
    return found
