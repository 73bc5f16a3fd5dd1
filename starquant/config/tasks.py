"""Which tasks are scored, and the consent that some of them need."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from starquant.config.fields import INERT, Count, Name, Spec, TaskName, UserPath
from starquant.errors import ConsentError

#: What the tasks of the test-beds are led by, whose items come with the package.
SHIPPED = ("testbed_", "smol_")
#: Tasks that run programs which the model writes.
EXECUTES_CODE = ("humaneval",)
#: Why one of them is left out.
NO_CONSENT = "runs programs that the model writes; tasks.allow_code_execution=true agrees to that"


class TasksSpec(Spec):
    """Which tasks are scored.

    Attributes:
        names: lm-eval task or group names; none to measure fidelity only.
        limit: items a task (a subject, for groups), null for all.
        data_dir: folder of JSONL files to read instead of the hub.
        allow_code_execution: consent to run model-written programs (HumanEval).
        allow_weak_sandbox: consent to run them where they cannot be kept from the network, files and processes.
        data_fingerprint: digest of the files in `data_dir`, filled in; it then stands for `data_dir`.
        left_out: tasks that would stand in `names`, and why they do not, filled in (`consented`); null for none.
    """

    name: Name
    names: tuple[TaskName, ...]
    limit: Count | None = None
    data_dir: UserPath | None = None
    allow_code_execution: bool = Field(default=False, json_schema_extra=INERT)
    allow_weak_sandbox: bool = Field(default=False, json_schema_extra=INERT)
    data_fingerprint: str | None = None
    left_out: dict[str, str] | None = Field(default=None, json_schema_extra=INERT)

    @property
    def is_shipped(self) -> bool:
        """Whether all items come with the package."""
        return all(name.startswith(SHIPPED) for name in self.names)

    def consented(self) -> TasksSpec:
        """Return the tasks that the user's consent covers; the others are left out.

        Where nothing else would be left to score, all of them: `validate_consent` refuses these.
        """
        without = {} if self.allow_code_execution else {n: NO_CONSENT for n in self.names if n in EXECUTES_CODE}
        names = tuple(name for name in self.names if name not in without)
        if not without or not names:
            return self
        return self.model_copy(update={"names": names, "left_out": {**(self.left_out or {}), **without}})


def validate_consent(tasks: TasksSpec) -> None:
    """Raise ConsentError when a task runs model-written programs and the user has not agreed."""
    risky = [name for name in tasks.names if name in EXECUTES_CODE]
    if risky and not tasks.allow_code_execution:
        raise ConsentError(
            f"tasks.allow_code_execution: {', '.join(risky)} runs programs that the model writes, in a sandbox "
            "(docs/offline-data.md); got false, set tasks.allow_code_execution=true to agree"
        )


def validate_sandbox(names: Sequence[str], missing: Sequence[str], agreed: bool) -> None:
    """Raise ConsentError when tasks run model-written programs that cannot be kept in, and the user has not agreed.

    Args:
        names: of the tasks.
        missing: what programs are not kept from, as it was measured here.
        agreed: `allow_weak_sandbox`.
    """
    risky = [name for name in names if name in EXECUTES_CODE]
    if risky and missing and not agreed:
        raise ConsentError(
            f"tasks.allow_weak_sandbox: {', '.join(risky)} runs programs that the model writes, and here the sandbox "
            f"is open: {', '.join(missing)} (util-linux's unshare can make no namespaces); got false, set "
            "tasks.allow_weak_sandbox=true to agree to that too"
        )
