"""The page of a single run: it beside full precision, whatever else lies in the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from starquant.config.run import RunSpec
from starquant.reports.page.experiment import show_runs
from starquant.store.items import items_folder
from starquant.store.records import RecordStore, read_record, twin_of
from tests.support.command_line import run_in_process
from tests.support.pages import data_of, put


def test_a_run_stands_beside_full_precision_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = (put(tmp_path, [1.0, 0.0], f"method={method}", "bits=w4a4") for method in ("rtn", "gptq"))
    assert twin_of(run) is None
    full = put(tmp_path, [1.0, 1.0], "method=none", "bits=w16a16")
    twin = RecordStore.name(RunSpec.from_config(read_record(run).spec).baseline())
    items_folder(full).rename(full.with_name(f"{twin}.items"))
    full = full.rename(full.with_name(f"{twin}.json"))
    assert (twin_of(run), twin_of(full)) == (full, None)
    show_runs([run], tmp_path, run.stem)
    page = tmp_path / "pages" / f"{run.stem}.html"
    assert capsys.readouterr().out == f"wrote {page}\n"
    rows = data_of(page.read_text(encoding="utf-8"))["table"]["rows"]
    assert [row["name"] for row in rows] == ["full precision", "w4a4 rtn"]


def test_a_single_run_ends_with_its_page_whose_flips_have_their_questions(tmp_path: Path) -> None:
    words = ("bits=w3a3", "method=rtn", "tasks.names=[testbed_arithmetic]", "tasks.limit=16", "fidelity=none")
    done = run_in_process(*words, results=tmp_path)
    assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "pages").iterdir()
    assert done.stdout.splitlines()[-1] == f"wrote {page}"
    (part,) = data_of(page.read_text(encoding="utf-8"))["flips"]
    assert part["items"] and all(item["question"].endswith("?") for item in part["items"])
