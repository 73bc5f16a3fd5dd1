"""Tasks that need consent: left out where others remain, and then another run than the one that scores them."""

from __future__ import annotations

import pytest

from starquant.config.tasks import EXECUTES_CODE, NO_CONSENT, validate_consent
from starquant.errors import ConsentError
from tests.support.specs import OPTIONS, spec

CONSENT = "tasks.allow_code_execution=true"
EIGHT = ("truthfulqa_mc2", "arc_challenge", "hellaswag", "winogrande", "piqa", "mmlu", "ceval-valid", "gsm8k")


@pytest.mark.parametrize(("model", "method"), [("llada", "rtn"), ("dream", "rtn"), ("tiny", "none")])
def test_without_consent_a_run_is_that_of_the_other_tasks(model: str, method: str) -> None:
    run = spec(f"model={model}", f"method={method}", "tasks=paper").canonical()
    assert run.tasks.names == run.baseline().tasks.names == EIGHT
    assert run.tasks.left_out == run.baseline().tasks.left_out == {"humaneval": NO_CONSENT}
    assert run.canonical() == run
    alone = spec(f"model={model}", f"method={method}", "tasks=paper", f"tasks.names=[{','.join(EIGHT)}]").canonical()
    assert (alone.digest(), alone.tasks.left_out) == (run.digest(), None)
    whole = spec(f"model={model}", f"method={method}", "tasks=paper", CONSENT).canonical()
    assert (len(whole.tasks.names), whole.tasks.left_out) == (9, None)
    assert whole.digest() != run.digest()
    assert whole.calibration_digest() == run.calibration_digest()


def test_the_reason_names_the_option_that_gives_consent() -> None:
    assert CONSENT in NO_CONSENT


@pytest.mark.parametrize("choice", ["tasks=humaneval", "tasks.names=[humaneval]"])
def test_where_nothing_else_would_be_left_nothing_is_left_out(choice: str) -> None:
    tasks = spec("model=llada", choice).canonical().tasks
    assert (tasks.names, tasks.left_out) == (("humaneval",), None)
    with pytest.raises(ConsentError, match=r"^tasks\.allow_code_execution: humaneval runs .* got false, set"):
        validate_consent(tasks)
    validate_consent(spec("model=llada", choice, CONSENT).canonical().tasks)


@pytest.mark.parametrize("suite", [name for name in OPTIONS["tasks"] if name not in ("paper", "humaneval")])
def test_other_suites_leave_nothing_out(suite: str) -> None:
    tasks = spec("model=smol" if suite.startswith("smol") else "model=tiny", f"tasks={suite}").tasks
    assert not {*EXECUTES_CODE} & {*tasks.names}
    assert tasks.consented() is tasks
