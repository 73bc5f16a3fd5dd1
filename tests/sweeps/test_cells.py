"""A command line as cells: which there are, what they are named by, and what is refused before anything runs."""

from __future__ import annotations

import functools
import hashlib
from itertools import product
from pathlib import Path

import pytest

from starquant.config.tasks import NO_CONSENT
from starquant.errors import ConfigError, ConsentError
from starquant.runs.preflight import validate_paths
from starquant.sweeps import overrides as judging
from starquant.sweeps.cells import Cell, Plan, left_out_of
from starquant.sweeps.command_line import plan_of
from starquant.sweeps.overrides import LAUNCHER_EXTRAS
from tests.support.specs import CONF, OPTIONS, spec


@functools.cache
def planned(*arguments: str) -> Plan:
    found = plan_of(arguments)
    assert found is not None
    return found


def keys(*arguments: str) -> list[str]:
    return [cell.key for cell in planned(*arguments).cells]


def names(*arguments: str) -> list[str]:
    return [cell.name for cell in planned(*arguments).cells]


@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_installed", lambda _: True)


def test_without_overrides_there_is_one_cell_of_the_papers_method() -> None:
    found = planned()
    assert (found.sweep, found.launcher, found.experiment) == (False, "basic", None)
    assert [cell.name for cell in found.cells] == ["tiny:0 w4a4 star_quant testbed"]


def test_a_cell_is_named_by_the_digest_of_what_was_asked_for() -> None:
    (cell,) = planned("bits=w8a8", "method=rtn").cells
    assert cell.key == spec("bits=w8a8", "method=rtn").canonical().digest()
    assert cell.spec == spec("bits=w8a8", "method=rtn")
    (cell,) = planned("model=llada", "method=rtn").cells
    assert cell.name == "llada w4a4 rtn paper"  # no seed


def test_the_cells_of_a_sweep_are_the_product() -> None:
    bits, methods = ("w8a8", "w4a4"), ("rtn", "awq")
    found = planned("-m", f"bits={','.join(bits)}", f"method={','.join(methods)}", "seed=3")
    assert found.sweep
    assert [cell.name for cell in found.cells] == [f"tiny:0 {b} {m} testbed" for b, m in product(bits, methods)]
    expected = [spec(f"bits={b}", f"method={m}", "seed=3").canonical().digest() for b, m in product(bits, methods)]
    assert [cell.key for cell in found.cells] == expected


def test_values_that_are_no_options_are_swept_too() -> None:
    bits = "bits.weights.bits"
    assert keys("-m", "method=rtn", f"{bits}=3,8") == [keys("method=rtn", f"{bits}={n}")[0] for n in (3, 8)]
    assert keys("-m", "method=rtn", "seed=range(1,3)") == [keys("method=rtn", f"seed={n}")[0] for n in (1, 2)]
    cfg = "model.protocol.testbed_facts.cfg_scale"
    added = keys("-m", "method=rtn", f"+{cfg}=0.0,1.0")
    assert added == [spec(f"+{cfg}={value}").canonical().digest() for value in (0.0, 1.0)]


def test_what_is_the_same_run_is_one_cell() -> None:
    """Full precision has one spelling, whatever the bits; so has a value that is named twice."""
    assert names("-m", "bits=w8a8,w4a4", "method=none") == ["tiny:0 w16a16 none testbed"]
    assert names("-m", "bits=w16a16,w4a4", "method=rtn,none") == [
        "tiny:0 w16a16 none testbed",
        "tiny:0 w4a4 rtn testbed",
    ]
    assert len(keys("-m", "method=rtn", "seed=1,1,2")) == 2
    assert len(keys("-m", "method=rtn", "tracker=none,wandb")) == 1


def test_globs_stand_for_all_options() -> None:
    found = names("-m", "bits=glob(*)", "method=rtn")
    assert found == [f"tiny:0 {b} {'none' if b == 'w16a16' else 'rtn'} testbed" for b in OPTIONS["bits"]]
    some = names("-m", "bits=w4a4", "method=glob(quarot*,exclude=*_*)")
    assert some == ["tiny:0 w4a4 quarot testbed"]


def test_an_experiment_is_a_sweep_by_itself_and_the_command_line_wins() -> None:
    found = planned("experiment=table2_ablation", "model=tiny")
    assert (found.sweep, found.experiment) == (True, "table2_ablation")
    methods = ("star_quant_no_tac", "star_quant_no_sgat", "star_quant")
    assert [cell.name for cell in found.cells] == [f"tiny:0 w4a4 {method} testbed" for method in methods]
    assert keys("-m", "experiment=table2_ablation", "model=tiny") == [cell.key for cell in found.cells]
    other = planned("experiment=table2_ablation", "model=tiny", "bits=w8a8,w4a8", "method=rtn")
    assert [cell.name for cell in other.cells] == ["tiny:0 w8a8 rtn testbed", "tiny:0 w4a8 rtn testbed"]
    (one,) = planned("experiment=table3_tac_block_size", "model=tiny", "method.tac.block_size=4").cells
    assert one.spec.method.model_dump()["tac"]["block_size"] == 4


def test_an_experiment_keeps_what_it_does_not_sweep() -> None:
    (cell,) = planned("experiment=table5_w8a8", "model=llada", "method=rtn", "tasks.limit=3").cells
    assert (cell.name, cell.spec.tasks.limit) == ("llada w8a8 rtn paper", 3)


@pytest.mark.parametrize(
    "setting",
    [
        "paths.results=elsewhere",
        "runtime.batch_size=3",
        "runtime.device=cuda",
        "launcher=slurm",
        "hydra.launcher.n_jobs=3",
        "tracker=wandb",
        "reuse=never",
        "stage=evaluate",
        "debug.traceback=true",
        "calibration=testbed",  # of a method that fits nothing
        "+experiment.name=mine",
    ],
)
def test_keys_do_not_depend_on_inert_settings(setting: str) -> None:
    given = ["launcher=joblib", setting] if setting.startswith("hydra") else [setting]
    for launcher in [one.removeprefix("launcher=") for one in given if one.startswith("launcher=")]:
        pytest.importorskip(LAUNCHER_EXTRAS[launcher][0])  # without it Hydra cannot compose
    found, plain = planned("-m", "method=rtn", *given), planned("-m", "method=rtn")
    assert [cell.key for cell in found.cells] == [cell.key for cell in plain.cells]
    assert found.name.split("-")[-1] == plain.name.split("-")[-1]


def test_keys_depend_on_what_changes_a_score() -> None:
    settings = ("seed=1", "bits=w8a8", "tasks.limit=3", "method=awq", "model.seed=1", "fidelity=none")
    found = [keys("method=rtn", setting)[0] for setting in settings]
    assert len({*found, *keys("method=rtn")}) == len(settings) + 1


def test_a_sweep_is_named_by_its_cells_not_by_their_order() -> None:
    one = planned("-m", "bits=w8a8,w4a4", "method=rtn")
    assert planned("-m", "method=rtn", "bits=w4a4,w8a8").name == one.name
    assert planned("-m", "bits=w8a8", "method=rtn").name != one.name
    text = " ".join(sorted(cell.key for cell in one.cells))
    assert one.name == f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    experiment = planned("experiment=table5_w8a8", "model=tiny", "bits=w8a8,w4a4", "method=rtn")
    assert experiment.name == one.name.replace("sweep", "table5_w8a8")


@pytest.mark.parametrize(
    "flags", [("--help",), ("--cfg", "job"), ("--cfg=job", "bits=w8a8"), ("-c", "all"), ("--info",), ("--version",)]
)
def test_what_runs_nothing_has_no_plan(flags: tuple[str, ...]) -> None:
    assert plan_of(flags) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("experiment=tabel1_main",), r"experiment: got 'tabel1_main', allowed: .*\. Did you mean 'table1_main'\?"),
        (("launcher=jobllib",), r"launcher: got 'jobllib', allowed: basic, .*\. Did you mean 'joblib'\?"),
        (("method=quarrot",), r"method: got 'quarrot', allowed: awq, .*\. Did you mean 'quarot'\?"),
        (("-m", "bits=w4a4,w4a5"), r"bits: got 'w4a5', allowed: .*w16a16, .*\. Did you mean 'w4a8'\?"),
        (("tasks.limt=3",), r"tasks.limt: unknown key; allowed: .*limit.* Did you mean 'limit'\?"),
        (("seed.x=3",), r"seed.x: unknown key; allowed: nothing"),
        (("seed=1,2",), r"seed: got several values, seed=1,2; add -m to run a sweep"),
        (("bits=w4a4,w8a8",), r"bits: got several values, bits=w4a4,w8a8; add -m"),
        (("bits=glob(*)",), r"bits: got several values, bits=glob\(\*\); add -m"),
        (("-m", "experiment=table2_ablation,table5_w8a8"), r"experiment: got several values, .* has one experiment"),
        (("-m", "launcher=basic,joblib"), r"launcher: got several values, .* has one launcher"),
        (("-m", "method=rtn", "seed=interval(1,2)"), r"seed: got seed=interval\(1,2\), allowed: a list, range or glob"),
        (("-m", "method=rtn", "seed=1,abc"), r"seed: got 'abc', allowed: valid integer"),
        (("rtn",), r"rtn: expected key=value"),
        (("--cfg", "job", "method=rtnn"), r"method: got 'rtnn', allowed: .*\. Did you mean 'rtn'\?"),
        (
            ("-m", "method=rtn,awq", "export.dir=x"),
            r"export.dir: got x for several cells of a sweep; allowed: a folder for",
        ),
        (("-m", "method=rtn", "export.dir=x,y"), r"export: got x \(packed\) and y \(packed\) for one run of a sweep"),
        (
            ("-m", "method=rtn", "bits=q4_0", "export.format=packed,gguf", "export.dir=x"),
            r"export: got x \(packed\) and x \(gguf\) for one run of a sweep; allowed: one for each",
        ),
        (("method=rtn", "launcher=joblib"), r"launcher: got 'joblib' for a single run; add -m"),
    ],
)
@pytest.mark.usefixtures("all_installed")
def test_bad_input_is_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        plan_of(arguments)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("launcher", sorted(LAUNCHER_EXTRAS))
def test_a_launcher_that_is_not_installed_names_its_extra(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(judging, "_installed", lambda module: bool(asked.append(module)))
    module, extra = LAUNCHER_EXTRAS[launcher]
    with pytest.raises(ConfigError) as caught:
        plan_of(["-m", "method=rtn", "seed=1,2", f"launcher={launcher}"])
    assert str(caught.value) == f"launcher: got '{launcher}', which needs: pip install 'starquant[{extra}]'"
    assert asked == [module]


def test_whether_a_launcher_is_installed() -> None:
    assert judging._installed("hydra.core")
    assert not judging._installed("hydra.nothing")
    assert not judging._installed("nothing_at_all.launcher")


def test_every_launcher_that_needs_a_package_is_known() -> None:
    used = {
        path.stem for path in Path(CONF / "launcher").glob("*.yaml") if "override /hydra/launcher" in path.read_text()
    }
    assert used == set(LAUNCHER_EXTRAS)


def test_a_method_without_its_file_is_told_apart_from_an_unknown_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "METHODS", {"fresh": "a.b:C"})
    with pytest.raises(ConfigError, match=r"^method: 'fresh' is registered, but conf/method/fresh.yaml is missing$"):
        plan_of(["method=fresh"])


def cells(*words: str) -> tuple[Cell, ...]:
    found = plan_of(["method=star_quant", *words])
    assert found is not None
    return found.cells


def test_what_scores_nothing_is_another_cell() -> None:
    keys = {cells(f"stage={stage}")[0].key for stage in ("all", "calibrate", "inspect")}
    assert len(keys) == 3
    assert cells("stage=evaluate")[0].key == cells("stage=all")[0].key


@pytest.mark.parametrize(
    ("words", "left_out"),
    [
        (("model=llada", "bits=w4a4"), True),  # as the README has it
        (("model=llada", "bits=w4a4", "tasks.allow_code_execution=true"), False),
        (("-m", "model=llada,llada_1_5,tiny", "method=rtn,none"), True),
        (("experiment=table1_main", "method=rtn"), True),
        (("experiment=table1_main", "model=tiny", "method=rtn"), False),
        (("model=llada", "tasks.names=[piqa]"), False),
        *((("model=llada", f"stage={stage}"), False) for stage in ("calibrate", "inspect")),
        *((("model=llada", f"stage={stage}", "tasks.names=[humaneval]"), False) for stage in ("calibrate", "inspect")),
    ],
)
def test_tasks_without_consent_are_left_out_of_the_cells(words: tuple[str, ...], left_out: bool) -> None:
    plan = planned(*words)
    assert left_out_of(plan) == ({"humaneval": NO_CONSENT} if left_out else {})
    for cell in plan.cells:
        validate_paths(cell.spec)


@pytest.mark.parametrize(
    "words",
    [
        ("model=llada", "tasks=humaneval"),
        ("model=llada", "tasks.names=[humaneval]"),
        ("model=llada", "tasks.names=[piqa,humaneval]"),
        ("model=llada", "++tasks.names=[piqa,humaneval]"),
        ("-m", "model=llada", "tasks.names=[piqa],[humaneval]"),
        ("-m", "model=llada", "tasks=paper,humaneval"),
        ("model=llada", "stage=evaluate", "tasks=humaneval"),
    ],
)
def test_a_task_that_is_named_needs_consent(words: tuple[str, ...]) -> None:
    with pytest.raises(ConsentError, match=r"^tasks\.allow_code_execution: humaneval runs .* got false, set"):
        left_out_of(planned(*words))
    assert left_out_of(planned(*words, "tasks.allow_code_execution=true")) == {}


def test_consent_makes_another_cell() -> None:
    without, consent = keys("model=llada"), keys("model=llada", "tasks.allow_code_execution=true")
    assert without != consent
    assert keys("model=tiny") == keys("model=tiny", "tasks.allow_code_execution=true")


def test_a_sweep_has_one_results_folder_and_at_least_one_cell() -> None:
    with pytest.raises(ConfigError, match=r"paths\.results: got a, b; a sweep has one results folder"):
        plan_of(["-m", "paths.results=a,b", "method=rtn"])
