"""What a run's model and calibration text look like inside, kept as a report (`stage=inspect`)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from starquant.config.digest import digest_of
from starquant.errors import ConfigError
from starquant.evaluation.activations import report
from starquant.runs.calibrate import calibration_states
from starquant.runs.inputs import Inputs
from starquant.runs.timing import device_name
from starquant.session.session import Session
from starquant.store import provenance
from starquant.store.files import set_aside, write_atomically
from starquant.store.locks import exclusive, lock_path
from starquant.store.verification import is_intact, sealed

log = logging.getLogger(__name__)


def inspect_activations(inputs: Inputs, session: Session) -> tuple[Path, bool]:
    """Return the report of the activations, and whether it was there already.

    Args:
        inputs: of the run; its method chooses nothing but whether there is calibration text.
        session: where it happens.

    Raises:
        StarquantError: no calibration text, activations that are not finite, a folder that cannot be written.
    """
    spec, results, code = inputs.spec, Path(inputs.spec.paths.results), session.code
    whole = spec.calibration_identity()
    identity = {"model": whole["model"], "calibration": whole["calibration"]}
    name = spec.model.name + ("" if spec.model.seed is None else f"-seed{spec.model.seed}")
    path = results / "activations" / f"{name}-{digest_of(identity)}.json"
    with exclusive(lock_path(results, "activations", path.stem), f"the activations of {name}"):
        if path.exists() and spec.reuse != "never" and _is_of(path, code.fitting):
            log.info("reused: %s (reuse=never computes it again)", path)
            return path, True
        if spec.calibration.source is None:
            raise ConfigError(
                f"method: stage=inspect looks at calibration text, which '{spec.method.name}' reads none of; "
                "allowed: a method that calibrates, such as star_quant, and a calibration other than none"
            )
        loaded = inputs.load(session.device)
        states = calibration_states(spec, loaded, session)
        assert states is not None
        source = provenance.collect(session.device, device_name(session.device), code) | {"code_digest": code.fitting}
        header = {"name": name, "identity": identity, "provenance": source}
        content = report(loaded.model, states, header, session.progress)
        write_atomically(path, json.dumps(sealed(content), indent=1) + "\n")
    return path, False


def _is_of(path: Path, code: str) -> bool:
    """Return whether a report is what was written and of this code; a damaged one is set aside."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        same: bool = content["provenance"]["code_digest"] == code
        if same and not is_intact(content):
            raise ValueError("its content is not that of its seal")
    except (OSError, ValueError, KeyError, TypeError) as error:
        set_aside(path, f"{path}: not readable as a report ({error})")
        return False
    return same
