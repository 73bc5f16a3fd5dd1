"""Names that become files, paths of the user, and numbers of things: what is refused before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import annotated_types
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from starquant.config.fields import LONGEST_NAME
from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.config.samplers import SAMPLERS
from starquant.errors import ConfigError
from starquant.store.records import RecordStore
from tests.support.specs import compose, spec

NAMES = ("model.name", "bits.name", "tasks.name", "calibration.name", "fidelity.name", "speed.name", "debug.name")


def changed(path: str, value: Any) -> RunSpec:
    config = compose()
    *parents, leaf = path.split(".")
    here = config
    for parent in parents:
        here = here[parent]
    here[leaf] = value
    return RunSpec.from_config(config)


@pytest.mark.parametrize("path", [*NAMES, "method.name", "experiment.name"])
@pytest.mark.parametrize(
    "name", ["", "..", ".", "../x", "/etc/x", "a/b", "a\\b", "a b", "a\nb", "a\0b", "é", "-x", "~", "$HOME", "x" * 49]
)
def test_a_name_is_no_path_and_fits_a_file_name(path: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{path}: got .*, allowed: (at most|up to) {LONGEST_NAME} ") as caught:
        changed(path, name)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["../x", "a/b", "x" * 121, ""])
def test_a_task_is_no_path_either(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^tasks\.names\.0: got "):
        changed("tasks.names", [name])
    with pytest.raises(ConfigError, match=r"^model\.protocol\."):
        changed("model.protocol", {name: {"mc_num": 8}})


def test_the_longest_names_still_make_files_below_the_results(tmp_path: Path) -> None:
    long = {part: {**compose()[part], "name": "x" * LONGEST_NAME} for part in ("model", "bits", "method", "tasks")}
    run = RunSpec.from_config(compose() | long)
    record = RecordStore(tmp_path).path(run)
    assert record.parent == tmp_path / "records"
    assert len(f".{record.name}.12345678.part.damaged.100".encode()) <= os.pathconf(tmp_path, "PC_NAME_MAX")


PATHS = ("paths.results", "tasks.data_dir", "calibration.source.path", "fidelity.source.path", "export.dir")


@pytest.mark.parametrize("path", [*PATHS, "tracker.dir"])
def test_a_home_is_expanded_in_every_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    run: Any = changed(path, "~/x é=,(")
    for part in path.split("."):
        run = getattr(run, part)
    assert run == "/home/of/mine/x é=,("
    for other in ("~no_such_user_here/x", "", "a\0b"):
        with pytest.raises(ConfigError, match=rf"^{path}: got .*allowed: a path"):
            changed(path, other)


def test_the_home_of_a_checkpoint_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert spec("model=llada", "model.path='~/x'").model.path == "/home/of/mine/x"


def numbers(kind: type[BaseModel], prefix: str = "") -> dict[str, list[Any]]:
    """Every whole number below a part of the specification, with what its annotation says."""
    named: dict[str, list[Any]] = {}
    for name, field in kind.model_fields.items():
        parts: list[Any] = [field]
        while parts:
            part = parts.pop()
            annotation = part.annotation if isinstance(part, FieldInfo) else part
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                named |= numbers(annotation, f"{prefix}{name}.")
            elif annotation is int:
                named[f"{prefix}{name}"] = [*part.metadata] if isinstance(part, FieldInfo) else []
            elif hasattr(annotation, "__metadata__"):
                if int in (annotation.__origin__, *getattr(annotation.__origin__, "__args__", ())):
                    named[f"{prefix}{name}"] = [c for m in annotation.__metadata__ for c in getattr(m, "metadata", [m])]
            else:
                parts += getattr(annotation, "__args__", ())
    return named


ROOTS = {"": RunSpec} | {f"{name}.": METHODS.options(name) for name in METHODS}
ROOTS |= {f"{name}.": SAMPLERS.load(name) for name in SAMPLERS}
NUMBERS = {prefix + name: bounds for prefix, kind in ROOTS.items() for name, bounds in numbers(kind).items()}


def test_every_whole_number_is_bounded_on_both_sides() -> None:
    wide = {"runtime.batch_size"}  # a number or a word, judged by a validator of its own
    assert {"runtime.threads", "calibration.bins", "star_quant.transform.rows", "llada.steps", "seed"} <= {*NUMBERS}
    for name, bounds in NUMBERS.items():
        kinds = {type(bound) for bound in bounds}
        above = kinds & {annotated_types.Le, annotated_types.Lt}
        below = kinds & {annotated_types.Ge, annotated_types.Gt}
        assert name in wide or (above and below), (name, bounds)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("runtime.threads", 1_000_000),
        ("runtime.threads", 10**400),
        ("runtime.batch_size", 10**9),
        ("calibration.bins", 65),
        ("calibration.source.segments", 10**9),
        ("calibration.source.length", 2**21),
        ("model.protocol.testbed_facts.mc_num", 10**9),
        ("model.protocol.testbed_facts.num_fewshot", 10**9),
        ("model.trajectory.steps", 10**9),
        ("fidelity.positions", 10**9),
        ("tasks.limit", 2**31),
        ("tracker.timeout_s", 1e300),
    ],
)
def test_more_than_can_be_meant_is_one_line(path: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{path}: got .*, allowed: ") as caught:
        changed(path, value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_tokens_of_a_calibration_are_bounded_together() -> None:
    with pytest.raises(ConfigError, match=r"^calibration\.source\.?.*segments: got 16384 of length 32768, allowed: "):
        spec("calibration=testbed", "calibration.source.segments=16384", "calibration.source.length=32768")
    with pytest.raises(
        ConfigError, match=r"^calibration.*states\.per_segment: got 1024, .*; allowed: at most 268,435,456"
    ):
        spec("calibration=testbed", "calibration.source.segments=10000", "calibration.states.per_segment=1024")
