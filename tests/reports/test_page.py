"""A page as a file: complete in itself, no markup from records, one line for what it cannot be made of."""

from __future__ import annotations

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from starquant.errors import RecordError
from starquant.reports.page import render
from starquant.reports.page.__main__ import main
from starquant.reports.page.charts import charts
from tests.support.pages import HOSTILE, content, data_of, fill, put
from tests.support.records import edit_record


class Elements(HTMLParser):
    """Elements of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where altair is not installed."""
    monkeypatch.setitem(sys.modules, "altair", None)


def hostile(folder: Path) -> None:
    """Records whose answers, names and device are markup."""
    path = fill(folder, HOSTILE)

    def change(data: dict) -> None:
        data["spec"]["method"]["name"] = f"rtn{HOSTILE}"
        data["provenance"]["device_name"] = HOSTILE

    edit_record(path, change)


def test_texts_of_records_inject_no_markup(tmp_path: Path, plain: None) -> None:
    fill(tmp_path / "calm")
    hostile(tmp_path / "hostile")
    calm, page = (render.render(content(tmp_path / name)) for name in ("calm", "hostile"))
    tags = [tag for tag, _ in Elements(page).seen]
    assert tags.count("script") == [tag for tag, _ in Elements(calm).seen].count("script") == 2
    assert "img" not in tags and "<img" not in page
    assert HOSTILE not in page
    data = data_of(page)
    assert f"b{HOSTILE}" in [item["quantized"] for part in data["flips"] for item in part["items"]]
    assert f"rtn{HOSTILE}" in [row["label"] for row in data["table"]["rows"]]


def test_a_page_names_nothing_outside_itself_and_lets_no_other_script_run(tmp_path: Path, plain: None) -> None:
    fill(tmp_path)
    page = render.render(content(tmp_path))
    elements = Elements(page).seen
    named = [value for _, attributes in elements for name, value in attributes.items() if name in ("src", "href")]
    assert named and all(str(value).startswith("#") for value in named)
    assert not re.findall(r"url\(|@import|https?://", page)
    (policy,) = [attributes["content"] for _, attributes in elements if "http-equiv" in attributes]
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    anchors = {attributes.get("id") for _, attributes in elements}
    assert {str(value)[1:] for value in named} <= anchors


def test_json_of_a_page_ends_no_script() -> None:
    text = render.as_json({"a": "</script><!--&\u2028"})
    assert not {*"<>&\u2028"} & {*text}
    assert data_of(f'<script type="application/json" id="data">{text}</script>') == {"a": "</script><!--&\u2028"}


def test_without_altair_a_page_has_all_but_charts(tmp_path: Path, plain: None) -> None:
    fill(tmp_path)
    page = content(tmp_path)
    assert page.charts == {}
    assert page.notes["To be known"] == ["charts need altair: pip install 'starquant[report]'"]
    assert 'id="charts"' not in render.render(page)
    assert len(page.flips) == 2


def test_charts_are_of_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    fill(tmp_path)
    page = content(tmp_path)
    assert [*page.charts] == ["scores"]
    values = page.charts["scores"]["data"]["values"]
    assert [(point["row"], point["mean"]) for point in values] == [
        ("full precision", 75.0),
        ("w4a4 gptq", 50.0),
        ("w4a4 rtn", 37.5),
    ]
    put(tmp_path, [1.0, 1.0, 0.0, 0.0], "method=rtn", "bits=w8a8")
    against = content(tmp_path).charts["bits"]["data"]["values"]
    assert [(point["row"], point["x"], point["mean"]) for point in against] == [
        ("rtn", "w4a4", 37.5),
        ("rtn", "w8a8", 50.0),
    ]
    assert charts([], {"rows": [], "columns": []}, [], [], ([], []), []) == {}


def test_the_command_writes_beside_the_records(tmp_path: Path, plain: None, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "results")
    assert main([str(tmp_path / "results")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'results' / 'report.html'} (0.0 MB)\n"
    assert main([str(tmp_path / "results"), "--out", str(tmp_path / "a.html"), "--where", "method.name=rtn"]) == 0
    rows = data_of((tmp_path / "a.html").read_text())["table"]["rows"]
    assert [row["label"] for row in rows] == ["full precision", "rtn"]


def test_a_damaged_record_is_named_on_the_page(tmp_path: Path, plain: None, capsys: pytest.CaptureFixture[str]) -> None:
    path = fill(tmp_path)
    path.write_text(path.read_text().replace('"value": 0.25', '"value": 0.75'))
    assert main([str(tmp_path), "--out", str(tmp_path / "a.html")]) == 2
    assert path.name in capsys.readouterr().err
    assert path.name in (tmp_path / "a.html").read_text().partition("<h3>Refused</h3>")[2]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tabel1_main"], "error: report: got 'tabel1_main', allowed: a folder, table1_main, "),
        (["--oot", "x"], "error: starquant report: --oot: not understood; allowed: --help, --out, "),
        ([""], "error: report: got '', allowed: a path"),
        (["~nosuchuser/x"], "error: report: got '~nosuchuser/x', but that home is not known"),
        (["--records", "nowhere"], "error: --out: nowhere is no folder"),
    ],
)
def test_bad_words_are_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


def test_a_folder_without_records_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: holds no record\n"
    put(tmp_path, [1.0, 0.0], "method=rtn", "bits=w4a4")
    with pytest.raises(RecordError, match="holds no record of table2_ablation"):
        content(tmp_path, experiment="table2_ablation")


def test_a_page_that_cannot_be_written_is_one_line(
    tmp_path: Path, plain: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, [1.0, 0.0], "method=rtn", "bits=w4a4")
    assert main([str(tmp_path), "--out", str(tmp_path)]) == 2
    line = f"error: --out: {tmp_path}: is a folder; allowed: a file, such as {tmp_path}/report.html\n"
    assert capsys.readouterr().err == line

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main([str(tmp_path), "--out", str(tmp_path / "a.html")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/a.html: No space left on device\n"
