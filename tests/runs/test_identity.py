"""What a run is known by: everything that it reads, by content."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from starquant.errors import CheckpointError, DataError
from starquant.runs.execute import execute
from starquant.runs.inputs import pin
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.specs import spec

#: Files that transformers reads a tokenizer, its templates and generation from.
BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja", "generation_config.json"),
    *("tokenizer.model", "qwen.tiktoken", "chat_template.json", "tokenizer.4.0.0.json"),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with all of these; the embedded model has the first two."""
    folder = shutil.copytree(weights_folder(0), tmp_path / "model")
    for name in BESIDE:
        (folder / name).parent.mkdir(exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(200 * "Anna lives in Bern. Otto lives in Rome.\n")
    return path


def exchange(path: Path, old: str, new: str) -> None:
    """Put another text of the same length into a file, and leave its time as it was."""
    content, stamp = path.read_text(), path.stat()
    assert old in content and len(old) == len(new)
    path.write_text(content.replace(old, new, 1))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def of(checkpoint: Path) -> tuple[str, str]:
    return f"model.path={checkpoint}", "model.seed=null"


def digests(*overrides: str) -> tuple[str, str]:
    run = pin(spec("method=gptq", *overrides)).spec
    return run.digest(), run.calibration_digest()


@pytest.mark.parametrize("name", BESIDE)
def test_every_file_beside_the_weights_makes_another_run_and_calibration(checkpoint: Path, name: str) -> None:
    before = digests(*of(checkpoint))
    (checkpoint / "README.md").write_text("What nobody reads.")
    assert digests(*of(checkpoint)) == before
    exchange(checkpoint / name, "{", "[")
    after = digests(*of(checkpoint))
    assert after[0] != before[0] and after[1] != before[1]
    (checkpoint / name).unlink()
    assert len({before, after, digests(*of(checkpoint))}) == 3


def test_a_pipe_beside_the_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "merges.txt").unlink()
    os.mkfifo(checkpoint / "merges.txt")
    with pytest.raises(CheckpointError, match=r"merges\.txt: cannot be read: allowed: a regular file"):
        pin(spec(*of(checkpoint)))


def test_calibration_text_counts_by_content(text: Path) -> None:
    source = ("calibration.source.kind=text", f"calibration.source.path={text}")
    before = digests(*source)
    exchange(text, "Bern", "Rome")
    after = digests(*source)
    assert after[0] != before[0] and after[1] != before[1]


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_checkpoint_that_is_exchanged_before_it_is_read_is_refused(checkpoint: Path, name: str) -> None:
    for other in BESIDE[2:8] + BESIDE[9:]:
        (checkpoint / other).unlink()
    inputs = pin(spec(*of(checkpoint)))
    (checkpoint / name).write_text((checkpoint / name).read_text() + "\n")
    with pytest.raises(CheckpointError, match=f"^{checkpoint}: its files have changed since the run began"):
        inputs.load("cpu")


def test_a_text_that_is_exchanged_before_it_is_read_is_refused(text: Path) -> None:
    source = ("calibration.source.kind=text", f"calibration.source.path={text}", "calibration.source.segments=8")
    inputs = pin(spec("method=gptq", *source))
    exchange(text, "Bern", "Rome")
    with pytest.raises(DataError, match=r"^calibration\.source: its file has changed since the run began"):
        inputs.load("cpu")


def test_a_record_of_another_tokenizer_is_not_reused(checkpoint: Path, tmp_path: Path) -> None:
    for name in BESIDE[2:]:
        (checkpoint / name).unlink()
    quick = ("tasks.names=[testbed_facts]", "tasks.limit=2", "fidelity=none", f"paths.results={tmp_path / 'results'}")
    run = spec(*quick, *of(checkpoint), "method=none", "bits=w16a16")
    assert not execute(run).reused and execute(run).reused
    exchange(checkpoint / "tokenizer_config.json", "{\n ", "{\n\n")
    assert not execute(run).reused
