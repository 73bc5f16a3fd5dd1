"""Training of a delta: repeatable, resumable, bounded in time, and of the shipped layout."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from starquant.errors import CheckpointError, ConfigError
from starquant.testbed.smol.training import __main__ as train
from starquant.testbed.smol.training import loop as training
from starquant.testbed.smol.training import state as training_state
from starquant.testbed.smol.training.loop import Training
from starquant.testbed.smol.training.options import Options
from starquant.testbed.smol.training.packing import SHARES, shares_with
from tests.support import smol

STEPS, BATCH = 6, 2
TASKS = shares_with({"natural": 0})


@cache
def base() -> dict[str, Tensor]:
    return smol.random_base()


def options(out: Path, **changed: Any) -> Options:
    small = Options(
        out,
        shares=TASKS,
        tokens=STEPS * BATCH * 256,
        batch=BATCH,
        rank=4,
        seed=3,
        dtype="float32",
        save_every=2,
        log_every=4,
        validate_every=4,
        shard_rows=8,
    )
    return replace(small, **changed)


def training_of(out: Path, start: dict[str, Tensor] | None = None, **changed: Any) -> Training:
    return Training(options(out, **changed), base(), smol.bytes_tokenizer(), smol.stream, start, smol.HEAD_DIM)


def finished(out: Path, start: dict[str, Tensor] | None = None, **changed: Any) -> Path:
    assert training_of(out, start, **changed).go_on()
    return out


def written(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in training_state.DELTA_FILES]


def delta_of(folder: Path) -> dict[str, Tensor]:
    one, other = (load_file(folder / name) for name in training_state.DELTA_FILES)
    assert not {*one} & {*other}
    return one | other


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without its clock."""
    records = [json.loads(line) for line in (folder / training_state.LOG).read_text().splitlines()]
    assert all(record.pop("seconds") >= 0 for record in records)
    return records


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("training") / "whole")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smol.write_text(tmp_path_factory.mktemp("text") / "folder")


def test_training_is_repeatable_and_the_seed_matters(uninterrupted: Path, tmp_path: Path) -> None:
    torch.manual_seed(999)  # the caller's randomness does not matter
    assert written(finished(tmp_path / "same")) == written(uninterrupted)
    assert written(finished(tmp_path / "other", seed=4)) != written(uninterrupted)


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("kills", [(1,), (2,), (3,), (5,), (3, 5), (3, 2, 4)], ids=str)
def test_a_killed_training_goes_on(
    uninterrupted: Path, tmp_path: Path, kills: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = training.draw_masks, []

    def killing(one: Training, step: int) -> Iterator[None]:
        def draw(*arguments: Any) -> Any:
            if one.step == step:
                raise Killed
            made.append(one.step)
            return real(*arguments)

        monkeypatch.setattr(training, "draw_masks", draw)

    for step in kills:
        one = training_of(tmp_path)
        killing(one, step)
        with pytest.raises(Killed):
            one.go_on()
        assert not (tmp_path / training_state.CARD).exists()
        monkeypatch.setattr(training, "draw_masks", real)
    made.clear()
    one = training_of(tmp_path)
    killing(one, STEPS)
    assert one.go_on()
    assert made == list(range(max(kills) // 2 * 2, STEPS))  # nothing saved is done again
    assert written(tmp_path) == written(uninterrupted)
    assert log_of(tmp_path) == log_of(uninterrupted)


def test_killed_while_saving_the_last_whole_state_counts(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file, saved = training_state.save_file, []

    def torn(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        saved.append(metadata["step"])
        if len(saved) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training_state, "save_file", torn)
        finished(tmp_path)
    assert saved == ["2", "4"]
    assert written(finished(tmp_path)) == written(uninterrupted)


def test_a_training_out_of_time_goes_on(uninterrupted: Path, tmp_path: Path) -> None:
    calls = 0
    while not training_of(tmp_path, minutes=1e-9).go_on():  # one step a call
        assert (tmp_path / training_state.DELTA_FILES[0]).exists(), "as far as it has come"
        assert not (tmp_path / training_state.CARD).exists()
        calls += 1
    assert calls == STEPS - 1
    assert written(tmp_path) == written(uninterrupted)
    assert log_of(tmp_path) == log_of(uninterrupted)


def test_a_training_stops_in_time(tmp_path: Path) -> None:
    one = training_of(tmp_path, minutes=0.02, tokens=10**9, save_every=10**6)
    assert not one.go_on()
    assert 1.2 <= one.elapsed() < 6
    again = training_of(tmp_path, minutes=0.02, tokens=10**9)
    assert again.step == one.step > 1


def test_another_training_is_not_gone_on_with(tmp_path: Path, text: Path) -> None:
    assert not training_of(tmp_path, minutes=1e-9).go_on()
    for changed, name in (
        ({"seed": 4}, "seed 3, not 4"),
        ({"tokens": 10**6}, "tokens 3072, not 1000000"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"shares": shares_with({"natural": 0, "sums": 0.5})}, "shares"),
        ({"text": text, "shares": SHARES}, "text"),
    ):
        with pytest.raises(CheckpointError, match=rf"is of another training \(.*{name}.*use another --out"):
            training_of(tmp_path, **changed)
    with pytest.raises(CheckpointError, match=r"of another training .*start"):
        training_of(tmp_path, {name: tensor + 1 for name, tensor in training_of(tmp_path).network.delta().items()})
    assert training_of(tmp_path).step == 1


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / training_state.STATE).write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="not a whole training state"):
        training_of(tmp_path)


def test_the_loss_falls(tmp_path: Path, text: Path) -> None:
    folder = finished(tmp_path, text=text, shares=SHARES, tokens=30 * BATCH * 256, learning_rate=2e-2)
    lines = log_of(folder)
    assert [line["step"] for line in lines] == [*range(4, 29, 4), 30]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert lines[-1]["natural"] < lines[0]["natural"]
    assert lines[-1]["task"] < 0.5 * lines[0]["task"]


def test_the_result_is_a_delta_of_the_shipped_layout(uninterrupted: Path) -> None:
    delta = delta_of(uninterrupted)
    first, second = (sorted(load_file(uninterrupted / name)) for name in training_state.DELTA_FILES)
    assert first + second == sorted(delta)
    assert len(second) - len(first) in (0, 1)
    assert delta["1.q.B"].any()
    assert delta["1.q.B"].dtype == torch.bfloat16
    assert delta["mask"].dtype == torch.float32
    assert {path.name for path in uninterrupted.iterdir()} == {
        *training_state.DELTA_FILES,
        training_state.CARD,
        training_state.LOG,
    }
    card = json.loads((uninterrupted / training_state.CARD).read_text())
    assert card["arguments"]["seed"] == 3
    assert card["tokens"] == STEPS * BATCH * 256
    assert card["torch"] == torch.__version__
    assert card["device"] == "cpu"
    last = log_of(uninterrupted)[-1]
    assert card["held_out"] == {"natural": None, "task": last["task"]}


def test_a_delta_is_gone_on_from(uninterrupted: Path, tmp_path: Path) -> None:
    start = delta_of(uninterrupted)
    one = training_of(tmp_path, start)
    assert all(torch.equal(tensor, start[name]) for name, tensor in one.network.delta().items())
    assert one.go_on()
    assert written(tmp_path) != written(uninterrupted)


def test_a_finished_folder_is_not_trained_over(uninterrupted: Path) -> None:
    with pytest.raises(ConfigError, match="holds a finished training"):
        training_of(uninterrupted)


def test_what_diverges_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "weighted_mean", lambda loss_N, weight_N: loss_N.sum() * math.nan)
    with pytest.raises(ConfigError, match="the loss is not finite after 2 steps"):
        finished(tmp_path)
    assert not (tmp_path / training_state.STATE).exists()


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [training.learning_rate(step, 2000, 2e-3) for step in range(2001)]
    assert rates[0] == pytest.approx(2e-3 / 80, rel=1e-3)
    assert max(rates) == pytest.approx(2e-3, rel=0.01)
    assert rates[1000] == pytest.approx(2e-3 * 0.515)
    assert rates[2000] == pytest.approx(2e-3 * 0.03)
    assert rates[80:] == sorted(rates[80:], reverse=True)


def test_norms_learn_slowly_and_do_not_decay(tmp_path: Path) -> None:
    one = training_of(tmp_path)
    groups = {
        id(parameter): (group["weight_decay"], group["scale"])
        for group in one.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in one.network.named_parameters():
        assert groups[id(parameter)] == ((0.01, 1.0) if name.endswith((".A", ".B")) else (0.0, 0.1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--text: is missing, and 38% of the tokens are natural text"),
        (["--share", "natural=0", "--text", "."], "--text: would not be read with --share natural=0"),
        (["--share", "natural"], "--share natural: allowed: NAME=SHARE"),
        (["--share", "natural=0", "--tokens", "0"], "--tokens: got 0, allowed: 1 or more"),
        (["--share", "natural=0", "--learning-rate", "nan"], "--learning-rate: got nan, allowed: above 0"),
        (["--share", "natural=0", "--device", "cuda"], "--device cuda: there is no such device here"),
        (["--text", "no/such/folder"], "--text no/such/folder: no such folder"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.main(["--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_layers_beyond_the_base_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--layers: got 3, allowed: 1 to 2"):
        training_of(tmp_path, layers=3)
    assert len(training_of(tmp_path, layers=1).network.blocks) == 1
