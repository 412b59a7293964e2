"""The report in a real browser: headless Chromium driven by selenium, both from the system's packages (.ci/extra installs them)."""

import json
import shutil
import time

import pytest

from recbole_mm.report.collect import Gathered
from recbole_mm.report.page import render

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (.ci/extra installs it)")
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed (.ci/extra installs them)"),
]
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAUEBAAAACwAAAAAAQABAAACAkQBADs="


def page() -> Gathered:
    def made(label, dataset, values, score):
        return {
            "label": label, "dataset": dataset, "model": label, "test": {"recall@5": values, "ndcg@5": None}, "time": {"total_s": 10 * score},
            "memory": {"peak_rss_mb": 500.0}, "epochs": [{"epoch": e, "valid_score": score * e} for e in range(3)],
            "test_groups": {name: {"recall@5": values / 2} for name in ("cold", "warm", "rare", "middling", "popular")},
        }  # fmt: skip

    users = [
        {
            "user": f"u{n}",
            "dataset": "d",
            "history": ["a", "b"],
            "targets": ["c"],
            "models": [{"label": "A", "list": [{"item": "c", "score": 1.5, "hit": True}, {"item": "d", "score": 0.5, "hit": False}]}],
        }
        for n in range(3)
    ]
    items = {key: {"token": key, "title": f"item {key} of <b>", "picture": PIXEL} for key in "abcd"}
    spread = {"min": 1.0, "quarter": 2.0, "median": 3.0, "three quarters": 5.0, "max": 90.0, "mean": 4.0}
    card = {
        "name": "d", "users": 9, "items": 4, "interactions": 36, "density": 1.0, "per_user": spread, "per_item": spread, "cold": None,
        "texts": {"title": {"items": 4}}, "pictures": {"items": 3}, "features": {"clip": {"visual": {"items": 4}}},
    }  # fmt: skip
    more = {
        "cards": [card],
        "spreads": [{"dataset": "d", "label": "A", "curves": {"recall@5": [0.0, 0.5, 1.0]}, "users": 9}],
        "explanations": [{"label": "A", "prompt": "C-3", "rows": [["good <b>", "well made", "fit"]], "all": 1}],
    }
    return Gathered(
        "Report", **more, runs=[made("A", "d", 0.1, 1.0), made("B", "d", 0.3, 2.0), made("C", "d", 0.2, 3.0)], users=users, items=items
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text(render(page()), encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}",
    ):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    begin = time.monotonic()
    driver.get((folder / "report.html").as_uri())
    driver.loading = time.monotonic() - begin
    yield driver
    driver.quit()


def column(browser, number):
    return [
        row.find_elements("css selector", "td")[number].text for row in browser.find_elements("css selector", "#summary-table tbody tr")
    ]


def test_sorting(browser):
    buttons = browser.find_elements("css selector", "#summary-table th button")
    assert column(browser, 1) == ["A", "B", "C"]
    buttons[2].click()
    assert column(browser, 1) == ["B", "C", "A"]
    buttons[2].click()
    assert column(browser, 1) == ["A", "C", "B"]
    assert browser.find_elements("css selector", "#summary-table th")[2].get_attribute("aria-sort") == "ascending"
    buttons[1].send_keys(" ")  # by keyboard
    assert column(browser, 1) == ["C", "B", "A"]


def test_picking_a_user_shows_pictures_and_hits(browser):
    select = browser.find_element("id", "user")
    for option in select.find_elements("css selector", "option"):
        option.click()
        titles = [h.text for h in browser.find_elements("css selector", "#lists h3")]
        assert titles == ["History", "Came next", "A"]
        assert len(browser.find_elements("css selector", "#lists .hit")) == 1
        images = browser.find_elements("css selector", "#lists img")
        assert len(images) == 5 and all(
            browser.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 0", i) for i in images
        )
        assert "item c of <b>" in browser.find_element("id", "lists").text


def test_charts_are_drawn(browser):
    figures = browser.find_elements("css selector", ".figure")
    assert len(figures) >= 7 and all(figure.find_elements("css selector", ".main-svg") for figure in figures)
    assert "good <b>" in browser.find_element("id", "explanations").text


def test_no_error_and_no_request(browser):
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, errors
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in requests if m["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in urls)
    assert not [url for url in urls if url.startswith(("http", "ws", "ftp"))]


def test_a_phone_needs_no_sideways_scrolling(browser):
    size = browser.get_window_size()
    browser.set_window_size(500, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth + 1")
    browser.set_window_size(size["width"], size["height"])
