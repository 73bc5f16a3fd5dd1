"""What is listed is what a run would take, and every option of conf/ is listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from starquant.config.bits import AuthorsGrid
from starquant.sweeps.catalogue import methods, models, reading, tasks
from starquant.sweeps.command_line import plan_of
from tests.support.paths import REPOSITORY


def by_name(lines: list[tuple[str, ...]], header: tuple[str, ...]) -> dict[str, dict[str, str]]:
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


@pytest.fixture(scope="module")
def listed() -> dict[str, dict[str, str]]:
    return by_name(methods.lines(), methods.HEADER)


def test_every_method_is_listed_with_its_paper(listed: dict[str, dict[str, str]]) -> None:
    assert {*listed} == {path.stem for path in (REPOSITORY / "conf" / "method").glob("*.yaml")}
    assert listed["quarot"] == {
        "method": "quarot",
        "bits": "any",
        "authors' grid": "KV asymmetric, A clip 0.9, KV clip 0.95",
        "calibration": "yes",
        "exports": "yes",
        "paper": "2404.00456",
        "what it is": "QuaRot: rotations, then GPTQ",
    }
    assert listed["none"]["bits"] == "16"
    assert all(line["what it is"] for line in listed.values())


@pytest.mark.parametrize("name", ["none", "packed", "rtn", "quarot_rtn", "star_quant"])
def test_a_listed_method_is_as_a_run_takes_it(name: str, listed: dict[str, dict[str, str]]) -> None:
    plan = plan_of([f"method={name}"])
    assert plan is not None
    spec = plan.cells[0].spec
    assert listed[name]["calibration"] == ("yes" if spec.method.needs_calibration else "no")
    assert listed[name]["exports"] == ("yes" if spec.quantizes else "no")


def test_a_grid_in_words() -> None:
    assert methods.grid(AuthorsGrid()) == ""
    assert methods.grid(AuthorsGrid(weights_symmetric=False, activation_clip=0.9)) == "W asymmetric, A clip 0.9"


def test_models_and_what_they_are_run_with() -> None:
    listed = by_name(models.lines(), models.HEADER)
    assert {*listed} == {path.stem for path in (REPOSITORY / "conf" / "model").glob("*.yaml")}
    assert (listed["tiny"]["checkpoint"], listed["tiny"]["tasks"]) == ("in the package", "testbed")
    assert (listed["llada"]["checkpoint"], listed["llada"]["prompts"]) == ("GSAI-ML/LLaDA-8B-Base", "text")
    assert listed["llada_1_5"]["prompts"] == "chat"


def test_suites_and_their_tasks() -> None:
    listed = by_name(tasks.lines(), tasks.HEADER)
    assert {*listed} == {path.stem for path in (REPOSITORY / "conf" / "tasks").glob("*.yaml")}
    assert listed["paper"]["needs consent"] == "humaneval"
    assert listed["smol"] | {"what it is": ""} == {
        "suite": "smol",
        "items from": "the package",
        "needs consent": "-",
        "what it is": "",
        "tasks": "smol_sums smol_reading smol_lists smol_programs",
    }


@pytest.mark.parametrize(
    ("header", "first"),
    [
        ("# A (arXiv 2404.00456): b, c. D.", "A: b, c"),
        ("# A-7B (arXiv 1.2; d). E", "A-7B (d)"),
        ("# @package _global_\n# v1.5 of\n# a thing\nname: x\n# no header", "v1.5 of a thing"),
        ("name: x", ""),
    ],
)
def test_the_first_sentence_of_a_header(header: str, first: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(header)
    assert reading.headline(tmp_path / "a.yaml") == first


@pytest.mark.parametrize("command", [methods, models, tasks])
def test_a_word_too_many_is_one_line(command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--hepl"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.endswith("--hepl: not understood; allowed: --help. Did you mean '--help'?\n")
