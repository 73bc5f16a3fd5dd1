"""`dry_run=true`: passes are those of the run, nothing is written, weights are not read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from starquant.config.run import RunSpec
from starquant.errors import ConfigError, StarquantError
from starquant.evaluation.harness import answer_some
from starquant.evaluation.lm import DiffusionLM
from starquant.forecast.counting import Counted, Passes
from starquant.forecast.forecast import Forecast, forecast
from starquant.forecast.missing import Missing
from starquant.forecast.rehearsal import (
    Rehearsal,
    Speed,
    block_of_noise,
    first_tokens,
    of_few_words,
    steps_of,
    tokens_of,
    with_steps,
)
from starquant.forecast.table import in_bytes, render
from starquant.llama_cpp.writing import write_gguf
from starquant.models import load_tokenizer
from starquant.models.base import MaskedDiffusionModel
from starquant.runs.execute import execute
from starquant.runs.inputs import pin
from starquant.session.session import Session
from starquant.store import provenance
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.command_line import run_in_process
from tests.support.llama import block_model
from tests.support.models import ARCHITECTURES, fresh
from tests.support.specs import spec
from tests.support.states import states_of

QUICK = ("tasks.names=[testbed_facts]", "tasks.limit=4", "fidelity=none")


def quick(results: Path, *words: str) -> RunSpec:
    return spec(*QUICK, f"paths.results={results}", *words)


def stages(told: Forecast) -> dict[str, bool]:
    return {stage.name: stage.reused for stage in told.stages}


@pytest.mark.parametrize("task", ["testbed_facts", "testbed_arithmetic"])
def test_the_stand_in_counts_what_goes_through_the_model(task: str, tiny: MaskedDiffusionModel, tiny_tokenizer) -> None:
    """A likelihood and a generation task: the passes of the stand-in have the shapes of the model's own."""
    plan, seen = spec(f"tasks.names=[{task}]", "tasks.limit=6"), Counter()
    with torch.device("meta"):
        counted = Counted(type(tiny)(tiny.config), "cpu", torch.float32)

    def see(module: object, arguments: tuple[torch.Tensor, ...], output: object) -> None:
        seen[tuple(arguments[0].shape)] += 1

    handle = tiny.trunk().embedding.register_forward_hook(see)
    try:
        for model in (tiny, counted.model):
            lm = DiffusionLM(model, tiny_tokenizer, batch_size=4)
            with counted.counting() as passes:
                assert answer_some(lm, plan.model, plan.tasks, task, 6) == (6, 6)
    finally:
        handle.remove()
    assert seen and passes[0].shapes == seen
    assert passes[0].logit_rows > 0 and passes[0].tokens == sum(b * w * n for (b, w), n in seen.items())


def test_a_generation_of_few_words_has_the_same_passes(tiny: MaskedDiffusionModel, tiny_tokenizer) -> None:
    plan = spec("tasks.names=[testbed_arithmetic]")
    with torch.device("meta"):
        counted = Counted(type(tiny)(tiny.config), "cpu", torch.float32)
    lm = DiffusionLM(counted.model, tiny_tokenizer, batch_size=4)
    seen = []
    for words in (10**6, 50):
        with counted.of_few_words(words) as share, counted.counting() as passes:
            answer_some(lm, plan.model, plan.tasks, "testbed_arithmetic", 4)
        seen.append((passes[0].shapes, passes[0].logit_rows))
    assert seen[0] == seen[1] and share == len(counted.model.trunk().embedding.weight) / 50


def test_what_is_not_gone_through_is_in_proportion() -> None:
    counted = object.__new__(Counted)
    counted._shapes, counted._logit_rows = Counter(), 0

    def answer(count: int) -> tuple[int, int]:
        counted._shapes[1, 10] += 2 * min(count, 2048)
        counted._logit_rows += 3 * min(count, 2048)
        return min(count, 2048), 2048

    passes = counted.extrapolated(answer)
    assert (passes.number, passes.tokens, passes.logit_rows) == (4096, 40960, 6144)


def test_speed_is_a_line_between_the_timed_passes_and_in_proportion_beyond() -> None:
    speed = Speed([10, 20], [1.0, 1.4], 0.5)
    for shape, seconds in (((1, 5), 1.0), ((1, 10), 1.0), ((3, 5), 1.2), ((2, 10), 1.4), ((4, 10), 2.8)):
        assert speed.of_passes(Passes(Counter({shape: 1})), 1) == pytest.approx(seconds)
    assert speed.of_passes(Passes(Counter({(2, 10): 3}), 4), 7) == pytest.approx(7 * 3 * 1.4 + 4 * 0.5)


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=pytest.mark.slow if a == "llada_gqa" else ()) for a in ARCHITECTURES]
)  # GQA is Dream's as well
@pytest.mark.parametrize(
    "method", ["rtn", "gptq", "quarot", "awq", "smoothquant", "flatquant", "star_quant", "star_quant_plus"]
)
def test_a_method_is_rehearsed_on_one_block(architecture: str, method: str) -> None:
    model, plan = fresh(architecture), spec(f"method={method}", "bits=w4a4", "calibration=testbed")
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    states = states_of(model) if plan.method.needs_calibration else None
    block = block_of_noise(skeleton, "cpu", torch.float32, 512)
    before = {name: tensor.clone() for name, tensor in block.named_parameters()}
    assert len(block.trunk().blocks) == 1
    assert all(tensor.isfinite().all() and (tensor.any() or name.endswith("bias")) for name, tensor in before.items())
    options = with_steps(plan.method, 2)
    if getattr(options, "tac", None) is not None:  # 96 channels are no multiple of its blocks
        options = options.model_copy(update={"tac": options.tac.model_copy(update={"block_size": 16})})
    rehearsal = Rehearsal(block, options, plan.bits, states, 0.0 if states is None else tokens_of(states))
    cost = rehearsal.fit()
    assert all(tensor.equal(before[name]) for name, tensor in block.named_parameters())
    assert (cost.walks > 0, cost.seconds > 0, cost.bytes > 0) == (states is not None,) * 3
    assert rehearsal.apply(block, 0) > 0 and block.quantized
    assert Speed.of(block, [(2, 8)]).logit_row > 0


def test_a_fit_is_rehearsed_on_few_tokens_with_the_same_masks() -> None:
    model = fresh("llada_mha")
    states = states_of(model)
    few = first_tokens(states, tokens_of(states) // 2)
    assert 0 < tokens_of(few) <= tokens_of(states) // 2
    assert tokens_of(first_tokens(states, 1)) == states.batches[0].ids_BL.shape[1]
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    small = block_of_noise(skeleton, "cpu", torch.float32, 64)
    mapped = of_few_words(states, small)
    for batch, own in zip(mapped.batches, states.batches, strict=True):
        assert int(batch.ids_BL.max()) < 64 == small.trunk().embedding.num_embeddings
        assert (batch.ids_BL == mapped.mask_id).equal(own.ids_BL == states.mask_id)


def test_steps_are_those_of_the_transform() -> None:
    star, rtn = spec("method=star_quant").method, spec("method=rtn").method
    assert (steps_of(star), steps_of(with_steps(star, 3)), steps_of(rtn)) == (160, 3, 1)
    assert with_steps(rtn, 3) is rtn


def test_nothing_is_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("starquant.runs.inputs.read_model", read)
    results = tmp_path / "results"
    told = forecast(
        quick(results, "method=star_quant", "method.transform.steps=4", f"export.dir={tmp_path / 'a' / 'b'}")
    )
    assert list(stages(told)) == ["start", "load", "full precision", "calibrate", "quantize", "evaluate", "export"]
    assert not any(stages(told).values()) and not list(tmp_path.iterdir())
    assert told.seconds == pytest.approx(sum(stage.seconds for stage in told.stages))
    by_name = {stage.name: stage for stage in told.stages}
    assert by_name["full precision"].passes == by_name["evaluate"].passes > 0
    assert by_name["evaluate"].operations > 2 * 4 * 147456 * by_name["evaluate"].tokens  # 4 blocks and the head
    assert [part.name for part in by_name["evaluate"].parts] == ["testbed_facts"]
    assert told.disk["export"] > 0 and told.disk["calibration"] > 0


def test_fidelity_and_trajectories_are_counted(tmp_path: Path) -> None:
    told = forecast(spec("fidelity=testbed", "tasks.names=[testbed_facts]", "tasks.limit=2", "method=rtn"))
    by_name = {stage.name: stage for stage in told.stages}
    assert by_name["reference"].passes > 0 and by_name["fidelity"].passes > 0
    told = forecast(
        quick(tmp_path, "method=gptq", "calibration.states.sampler=trajectory", "calibration.source.segments=8")
    )
    recorded = {stage.name: stage for stage in told.stages}["calibrate"]
    assert recorded.passes >= 1 and recorded.tokens > 0


def test_what_is_there_is_said(tmp_path: Path) -> None:
    gptq = ("method=gptq", "calibration.source.segments=8")
    execute(quick(tmp_path, *gptq, "stage=calibrate"))
    told = forecast(quick(tmp_path, *gptq))
    assert [name for name, reused in stages(told).items() if reused] == ["calibrate"]
    execute(quick(tmp_path, *gptq))
    told = forecast(quick(tmp_path, *gptq))
    assert stages(told) == {"all of it": True} and told.seconds == 0
    assert "there already" in render(told)
    assert not any(stages(forecast(quick(tmp_path, *gptq, "reuse=never"))).values())
    told = forecast(quick(tmp_path, "method=rtn"))
    assert [name for name, reused in stages(told).items() if reused] == ["full precision"]


def test_a_gguf_that_was_exported_is_there(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    run = pin(quick(tmp_path, "bits=q8_0", "method=rtn", "export.format=gguf", f"export.dir={path}")).spec
    session = Session()
    session.memory.code = provenance.running_code()
    assert Missing.of(run, session).export
    for record, missing in (("of another run", True), (run.digest(), False)):
        made_by = {"name": "x", "method": "rtn", "bits": "f32", "record": record, "model": "x"}
        write_gguf(block_model("llada_mha"), load_tokenizer(weights_folder(0)), path, "F32", made_by)
        assert Missing.of(run, session).export == missing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("stage=inspect",), "dry_run: got stage=inspect, of which no forecast is made"),
        (("method=packed",), "dry_run: got method=packed, of which no forecast is made"),
        (("runtime.device=cuda:7",), "runtime.device"),
    ],
)
def test_what_has_no_forecast_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(StarquantError) as error:
        forecast(quick(tmp_path, *words))
    assert message.split(":")[0] in str(error.value) or isinstance(error.value, ConfigError)


def test_a_sweep_is_told_cell_by_cell(tmp_path: Path) -> None:
    words = [*QUICK, "-m", "method=rtn,none", "dry_run=true"]
    done = run_in_process(*words, results=tmp_path / "results")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("forecast: tiny-") == 2 and "2 cells, one after the other: " in done.stdout
    assert not (tmp_path / "results").exists()
    wrong = run_in_process(*words, "model.path=/nowhere", "model.seed=null", results=tmp_path / "results")
    assert wrong.returncode == 1 and "error: " in wrong.stderr and "Traceback" not in wrong.stderr


def test_figures_have_the_unit_that_a_reader_wants() -> None:
    assert [in_bytes(b) for b in (2e6, 16e9)] == ["2.0 MB", "16.0 GB"]
