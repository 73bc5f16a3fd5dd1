"""A page in Chromium: it opens from disk, sorts, changes the reference, shows flips; nothing is fetched, nothing fails.

Skipped where selenium, Chromium or its driver is missing (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from starquant.reports.page.render import write
from tests.support.pages import HOSTILE, content, fill
from tests.support.records import edit_record

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
#: Ends once every chart is drawn.
DRAWN = """
const wait = () => ("drawn" in document.body.dataset ? arguments[0]() : setTimeout(wait, 50));
wait();
"""
pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of three rows; texts of one record are markup."""
    folder = tmp_path_factory.mktemp("page")
    path = fill(folder / "records", HOSTILE)
    edit_record(path, lambda data: data["provenance"].update(device_name=HOSTILE))
    write(content(folder / "records"), folder / "page.html")
    return folder / "page.html"


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    """The page, drawn; afterwards nothing was said in the console, and nothing fetched but the file."""
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    yield browser
    assert [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    sent = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    urls = {one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"}
    assert {url.partition("#")[0] for url in urls if not url.startswith("data:")} == {page.as_uri()}


def texts(browser: Any, selector: str) -> list[str]:
    code = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)"
    return browser.execute_script(code, selector)


def choose(browser: Any, name: str, value: str) -> None:
    code = "it.value = arguments[1]; it.dispatchEvent(new Event('change'))"
    browser.execute_script(f"const it = document.getElementById(arguments[0]); {code}", name, value)


def click(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def methods(browser: Any) -> list[str]:
    return texts(browser, "#table tbody tr th:nth-of-type(2)")


def test_it_sorts_and_full_precision_stays_on_top(opened: Any) -> None:
    assert texts(opened, "#table tbody tr th:first-of-type") == ["full precision", "w4a4", "w4a4"]
    orders = []
    for _ in range(2):
        click(opened, "#table thead th:last-child button")
        orders.append(methods(opened))
    assert orders == [["", "gptq", "rtn"], ["", "rtn", "gptq"]]
    assert texts(opened, "#table thead th[aria-sort=ascending]") == ["facts acc, % \u2191"]


def test_any_row_is_the_reference(opened: Any) -> None:
    first = texts(opened, "#table .difference")
    assert len(first) == 2 and all(text.startswith("\u2212") for text in first)  # to full precision
    click(opened, "#table tr[data-row='2'] input")
    second = texts(opened, "#table .difference")
    assert [text.partition(" ")[0] for text in second] == ["+37.5", "+12.5"]  # full precision and gptq, to rtn
    assert texts(opened, "#table tr.reference th:nth-of-type(2)") == ["rtn"]
    click(opened, "#table tr[data-row='1'] input")
    mean, low, high = (float(part.strip("[],")) for part in second[1].replace("\u2212", "-").split()[:3])
    turned = texts(opened, "#table tr[data-row='2'] .difference")[0].replace("\u2212", "-").split()
    assert [float(part.strip("[],")) for part in turned[:3]] == [-mean, -high, -low]


def test_flipped_answers_are_shown_as_texts(opened: Any) -> None:
    assert texts(opened, "#flip-row option") == ["w4a4 gptq", "w4a4 rtn"]
    choose(opened, "flip-row", "2")
    shown = texts(opened, "#flip-table tbody tr td:nth-child(4)")
    assert shown == ["b", f"b{HOSTILE}", "z"]
    assert "4 items: 2 lost, 0 won, 1 answered otherwise" in texts(opened, "#flip-count")[0]
    choose(opened, "flip-kind", "other")
    assert texts(opened, "#flip-table tbody tr td:first-child") == ["3"]
    assert opened.execute_script("return window.hit === undefined && document.images.length === 0")


def test_charts_are_drawn_in_the_colours_of_the_page(opened: Any) -> None:
    pytest.importorskip("altair")
    opened.set_script_timeout(60)
    opened.execute_async_script(DRAWN)
    assert opened.execute_script("return document.querySelectorAll('#chart-scores svg').length") == 1
    colours = []
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        colours.append(
            opened.execute_script("return getComputedStyle(document.querySelector('#chart-scores svg text')).fill")
        )
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colours == ["rgb(27, 27, 31)", "rgb(230, 231, 234)"]


def test_a_narrow_window_scrolls_tables_not_the_page(opened: Any) -> None:
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    wide = opened.execute_script("return document.documentElement.scrollWidth - innerWidth")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= 0
