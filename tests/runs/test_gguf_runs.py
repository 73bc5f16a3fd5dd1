"""A GGUF out of a run, and a run on it: records named apart, refusals before anything is computed."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from starquant.errors import CheckpointError, ConfigError
from starquant.llama_cpp.reading import describe_gguf
from starquant.runs.execute import execute
from starquant.runs.gguf import with_file
from starquant.runs.preflight import validate_paths
from starquant.store import cache
from tests.support.llama import block_model, write
from tests.support.specs import spec

pytest.importorskip("gguf")

SMALL = ("model=tiny", "fidelity.source.segments=4", "calibration.source.segments=4", "runtime.threads=1")


def _run(tmp_path: Path, *overrides: str) -> Any:
    return execute(spec(*SMALL, "tasks=fidelity", f"paths.results={tmp_path / 'results'}", *overrides))


def _export(path: Path) -> tuple[str, str]:
    return "export.format=gguf", f"export.dir={path}"


def test_a_run_writes_the_file_once_and_knows_it_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.gguf"
    words = ("bits=q4_0", "method=quarot_folded", *_export(path))
    record = _run(tmp_path, *words).record
    described, written = describe_gguf(path), path.stat().st_mtime_ns
    assert (described.record, described.method, described.file_type) == (record.digest, "quarot_folded", "q4_0")
    assert _run(tmp_path, *words).reused
    assert path.stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match=r"m\.gguf: is there already; allowed: a new file"):
        _run(tmp_path, "bits=q4_0", "method=rtn", *_export(path))


@pytest.mark.parametrize(
    "words",
    [
        ("bits=q4_0", "method=quarot_folded", "tasks=fidelity"),
        ("method=none", "tasks=testbed", "tasks.names=[testbed_facts]", "tasks.limit=2"),
    ],
    ids=["q4_0", "f16"],
)
def test_blocks_on_disk_make_the_same_file(words: tuple[str, ...], tmp_path: Path) -> None:
    files = [tmp_path / f"{blocks}.gguf" for blocks in ("memory", "disk")]
    for path in files:
        results = f"paths.results={tmp_path / path.stem}"  # each calibrates for itself
        execute(spec(*SMALL, *words, f"runtime.blocks={path.stem}", results, *_export(path)))
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("method=quarot", "bits=q4_0"), r"method.out_hadamard: .*computes between the linears.*allowed: method=rtn"),
        (("method=star_quant", "bits=q4_0"), r"method.transform.fit: .*allowed: method=rtn, gptq, awq"),
        (("method=flatquant", "bits=q4_0"), r"method.algorithm: method=flatquant computes between"),
        (("method=rtn", "bits=w4a4"), r"bits.weights.block: got null with bits=4; .*allowed: bits=q4_0"),
        (("method=rtn", "bits=q4_0", "bits.activations.bits=16"), r"bits.activations: got 16 bits, but llama.cpp"),
        (("method=rtn", "bits=q4_0", "bits.tables=rows"), r"bits.tables: got rows"),
        (("method=rtn", "bits=q4_0", "bits.attention.v=8"), r"bits.attention: got operands below 16"),
        (("method=rtn", "bits=q4_0", "stage=calibrate"), r"export.dir: got method=rtn stage=calibrate"),
    ],
)
def test_what_a_gguf_does_not_hold_is_refused_first(words: tuple[str, ...], error: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=error):
        validate_paths(spec(*SMALL, *words, *_export(tmp_path / "m.gguf")))


def test_files_and_formats_that_do_not_fit_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"allowed: a file FILE\.gguf"):
        validate_paths(spec(*SMALL, "bits=q4_0", "export.format=gguf", f"export.dir={tmp_path / 'm'}"))
    with pytest.raises(ConfigError, match=r"got packed with bits=q4_0, whose blocks are llama.cpp's; allowed: gguf"):
        validate_paths(spec(*SMALL, "bits=q4_0", f"export.dir={tmp_path / 'm'}"))
    with pytest.raises(ConfigError, match=r"allowed: method=gguf with model\.engine=llama_cpp"):
        validate_paths(spec(*SMALL, "method=gguf"))
    with pytest.raises(ConfigError, match=r"path: got m with engine=llama_cpp, allowed: a file FILE\.gguf"):
        spec(*SMALL, "method=gguf", "model.engine=llama_cpp", "model.path=m")
    with pytest.raises(ConfigError, match="give either checkpoint"):
        spec(*SMALL, "method=gguf", "model.engine=llama_cpp", "model.path=m.gguf", "model.checkpoint=here")


def test_a_file_is_read_to_its_end_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the runs of every process, while nothing says that it is another; it is known by all of its bytes."""
    path = write(block_model("llada_mha"), tmp_path / "m.gguf")
    run = spec(*SMALL, "method=gguf", "model.engine=llama_cpp", f"model.path={path}")
    checkpoint: Any = SimpleNamespace(config={"model_type": "llada"}, folder=tmp_path)
    now, read, real = time.time, [], cache._read

    def counted(file: Path) -> str:
        read.append(file)
        return real(file)

    monkeypatch.setenv("STARQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache.time, "time", lambda: now() + 60)  # the file is not of this moment
    monkeypatch.setattr(cache, "_read", counted)
    for _ in range(2):
        cache._read_once.cache_clear()  # as of another process
        digest = with_file(run, checkpoint).model.file_fingerprint
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert read == [path]


def test_llama_cpp_scores_what_was_exported(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    words = ("bits=q4_0", "method=quarot_folded", *_export(tmp_path / "m.gguf"))
    ours = _run(tmp_path, *words).record
    engine = ("method=gguf", "model.engine=llama_cpp", f"model.path={tmp_path / 'm.gguf'}")
    theirs = _run(tmp_path, *engine)
    assert theirs.record.spec["method"]["name"] == "gguf_quarot_folded"
    assert theirs.record.spec["bits"]["name"] == "q4_0"
    kl = [
        {score.metric: score.value for score in record.scores if score.filter == "all"}
        for record in (ours, theirs.record)
    ]
    assert kl[1]["kl"] == pytest.approx(kl[0]["kl"], rel=0.3)
    assert "hidden_mse" in kl[0]
    assert "hidden_mse" not in kl[1]
    assert _run(tmp_path, *engine).reused
    copied = tmp_path / "copied.gguf"
    copied.write_bytes((tmp_path / "m.gguf").read_bytes())
    assert _run(tmp_path, *engine[:2], f"model.path={copied}").reused  # by content
    with pytest.raises(CheckpointError, match=r"none\.gguf: no such file"):
        _run(tmp_path, *engine[:2], f"model.path={tmp_path / 'none.gguf'}")


def test_full_precision_goes_into_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "f16.gguf"
    tasks = ("tasks=testbed", "tasks.names=[testbed_facts]", "tasks.limit=2")
    words = ("method=none", *tasks, *_export(path))
    execute(spec(*SMALL, f"paths.results={tmp_path / 'results'}", *words))
    assert describe_gguf(path).file_type == "f16"
