"""Which tasks are scored, and the consent that some of them need."""

from __future__ import annotations

from pydantic import Field

from starquant.config.fields import INERT, Count, Spec
from starquant.errors import ConsentError

#: Tasks that run programs which the model writes.
EXECUTES_CODE = ("humaneval",)


class TasksSpec(Spec):
    """Which tasks are scored.

    Attributes:
        names: lm-eval task or group names; none to measure fidelity only.
        limit: items a task (a subject, for groups), null for all.
        data_dir: folder of JSONL files to read instead of the hub.
        allow_code_execution: consent to run model-written programs (HumanEval).
        data_fingerprint: digest of the files in `data_dir`, filled in; it then stands for `data_dir`.
    """

    name: str
    names: tuple[str, ...]
    limit: Count | None = None
    data_dir: str | None = None
    allow_code_execution: bool = Field(default=False, json_schema_extra=INERT)
    data_fingerprint: str | None = None


def validate_consent(tasks: TasksSpec) -> None:
    """Raise ConsentError when a task runs model-written programs and the user has not agreed."""
    risky = [name for name in tasks.names if name in EXECUTES_CODE]
    if risky and not tasks.allow_code_execution:
        raise ConsentError(
            f"tasks.allow_code_execution: {', '.join(risky)} runs programs that the model writes, in a separate "
            "process with time, memory and file limits; got false, set tasks.allow_code_execution=true to agree"
        )
