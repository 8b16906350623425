"""The page in a real browser: a person chooses a seed, sees previews and both pictures, and how far apart they are."""

import shutil
import time

import pytest
from accuquant.runtime.bundle import ByClass, ByText

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not here; apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1000,800",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def text(browser, selector):
    return browser.find_element("css selector", selector).text


def opened(browser, address):
    browser.get(address)
    until(lambda: "steps" in text(browser, "#about"))


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def shown(browser, name):
    return browser.find_element("id", name).is_displayed()


def test_a_person_paints_and_compares(browser, house, tmp_path):
    """Pictures one level of 255 apart: 20 log10 255 = 48.1 dB."""
    with house.running([house.by_hand(network=side) for side in ("denoiser", "twin")]) as (address, _):
        opened(browser, address)
        assert not shown(browser, "prompt")
        browser.find_element("id", "seed").send_keys("7")
        browser.find_element("id", "paint").click()
        until(lambda: text(browser, "#verdict") or text(browser, "#error"))
        assert text(browser, "#verdict") == "Same seed, W8A8 against full precision: 48.1 dB PSNR."
        captions = [figure.text for figure in browser.find_elements("css selector", "figure")]
        assert captions[0].startswith("W8A8\nseed 7")
        assert captions[1].startswith("full precision\nseed 7")
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('figure img')].map(i => [i.naturalWidth, i.naturalHeight])"
        )
        assert sizes == [[4, 4], [4, 4]]
        assert browser.save_screenshot(str(tmp_path / "page.png"))
    assert browser.get_log("browser") == [], "the page's own policy or script was violated"


def test_previews_are_seen_before_the_picture_and_a_person_may_stop(browser, house):
    painter = house.by_hand()
    with house.running([painter]) as (address, _):
        opened(browser, address)
        painter.pipeline.hold.clear()
        browser.find_element("id", "paint").click()
        until(lambda: shown(browser, "stop"))
        painter.pipeline.step()
        painter.pipeline.step()
        until(lambda: "of 4" in text(browser, "figcaption"))
        assert browser.execute_script("return document.querySelector('figure img').naturalWidth") == 4
        browser.find_element("id", "stop").click()
        until(lambda: text(browser, "#error") == "stopped")
        painter.pipeline.hold.set()
        until(lambda: not browser.find_element("id", "stop").is_displayed())


@pytest.mark.parametrize(
    ("conditioning", "guidance", "fields"),
    [
        (None, None, set()),
        (ByClass(classes=10, null=10), 2.0, {"class", "guidance"}),
        (ByText(examples=("red apple",)), 1.0, {"prompt"}),
        (ByText(examples=("red apple",)), 3.0, {"prompt", "negative", "guidance"}),
    ],
)
def test_it_asks_for_what_the_bundle_takes(browser, house, conditioning, guidance, fields):
    with house.running([house.by_hand(conditioning, guidance=guidance)]) as (address, _):
        opened(browser, address)
        assert {name for name in ("prompt", "class", "negative", "guidance") if shown(browser, name)} == fields
        if "prompt" in fields:
            browser.find_element("id", "prompt").send_keys("a cat")
        browser.find_element("id", "paint").click()
        until(lambda: "seed" in text(browser, "figcaption"))


def test_refusals_are_shown_in_words(browser, house):
    with house.running([house.by_hand()]) as (address, server):
        opened(browser, address)
        for worker in server.workers.values():
            worker.drain()
        browser.find_element("id", "paint").click()
        until(lambda: "about to stop" in text(browser, "#error"))


def test_it_asks_for_the_key_where_there_is_one(browser, house):
    with house.running([house.by_hand()], api_key="secret") as (address, _):
        browser.get(address)
        until(lambda: shown(browser, "key"))
        browser.find_element("id", "key").send_keys("secret\t")
        until(lambda: "steps" in text(browser, "#about"))
        browser.find_element("id", "paint").click()
        until(lambda: "seed" in text(browser, "figcaption"))
