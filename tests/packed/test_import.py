"""What has to be imported for a packed checkpoint to load: `starquant.packed`, or whatever loads models here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from starquant.models import load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.packed.export import export
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.methods import method_named
from tests.support.models import fresh
from tests.support.records import make_record
from tests.support.specs import spec

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A packed model of each family."""
    root = tmp_path_factory.mktemp("packed")
    return [str(packed(fresh(name), root / name)) for name in ("llada_gqa", "dream_gqa")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, whose tokenizer and context tasks fit."""
    return packed(load_model(weights_folder(0)), tmp_path_factory.mktemp("tiny") / "packed")


def packed(model: MaskedDiffusionModel, folder: Path) -> Path:
    method, bits = method_named("rtn", "bits=w8a8")
    method.apply(model, method.fit(model, bits), bits, packed=True)
    export(model, make_record(spec()), weights_folder(0), folder)
    return folder


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=environment, cwd=cwd
    )


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param(
            "import starquant.packed; from transformers import AutoModel; load = AutoModel.from_pretrained",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import starquant.models; from transformers import AutoModel; load = AutoModel.from_pretrained",
            marks=pytest.mark.slow,
        ),
        "from starquant.models import load_model as load",
    ],
)
def test_what_loads_it(folders: list[str], imports: str) -> None:
    done = python("-c", f"import torch; {imports}\n{norms(folders)}")
    assert done.returncode == 0, done.stderr
    assert_norms(done.stdout, folders)


def norms(folders: list[str]) -> str:
    """Code that prints the norm of each model's logits, by `load`."""
    return (
        f"for folder in {folders}:\n"
        f"    print(float(load(folder)(torch.tensor({IDS.tolist()})).logits.detach().norm()))\n"
    )


def assert_norms(printed: str, folders: list[str]) -> None:
    expected = [float(load_model(Path(folder))(IDS).logits.detach().norm()) for folder in folders]
    assert [float(line) for line in printed.splitlines()[-len(folders) :]] == pytest.approx(expected, rel=1e-4)


def test_transformers_loads_it_once_the_package_is_imported_and_no_method_is(folders: list[str]) -> None:
    """Without `starquant.packed` it is refused."""
    code = (
        "import sys, torch, starquant\n"
        "from transformers import AutoModel\n"
        f"for folder in {folders}:\n"
        "    try: AutoModel.from_pretrained(folder)\n"
        "    except ValueError as error: print('refused:', str(error).splitlines()[0])\n"
        "import starquant.packed; load = AutoModel.from_pretrained\n"
        f"{norms(folders)}"
        "fitting = ('starquant.methods', 'starquant.calibration', 'lm_eval', 'hydra')\n"
        "bad = [m for m in sys.modules if m.startswith(fitting)]\n"
        "assert not bad, bad"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused: ") == len(folders), done.stdout
    for own in (
        "Transformers does not recognize this architecture",
        "contains custom code",
    ):  # Dream's config names some
        assert own in done.stdout
    assert_norms(done.stdout, folders)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys; hooks = list(sys.meta_path); import starquant\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules, hooks == sys.meta_path)"
    )
    assert python("-c", code).stdout.split() == ["False", "False", "True"]


def test_a_completion_needs_no_import(tiny: Path) -> None:
    done = python("-m", "starquant.packed.completion", str(tiny), "the city of ada is", "--length", "8")
    assert (done.returncode, bool(done.stdout.strip())) == (0, True), done.stderr


def test_lm_evals_command_line_needs_no_import(tiny: Path, tmp_path: Path) -> None:
    tasks = Path(__file__).resolve().parents[2] / "starquant" / "evaluation" / "tasks"
    done = python(
        *("-m", "starquant.evaluation", "run", "--model", "starquant", "--model_args", f"path={tiny}"),
        *("--include_path", str(tasks), "--tasks", "testbed_facts", "--limit", "2"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "testbed_facts" in done.stdout
