"""The page in a real Chromium: `pip install 'flacuna-jax[serve,browser]'`, and chromium with its driver, as in
`apt-get install chromium chromium-driver`. With FLACUNA_SCREENSHOTS=DIR, pictures are written there."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from tests.serving.models import make_adapters, prepared
from tests.serving.serving import Running, running

pytestmark = pytest.mark.slow
webdriver = pytest.importorskip("selenium.webdriver")

QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""A browser without a screen that talks only to the page's server."""


@pytest.fixture(scope="module")
def server(story_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    adapters = make_adapters(tmp_path_factory.mktemp("adapters"), story_llama)
    with running(*prepared(story_llama, adapters, "--rows", "4", "--context", "400")) as server:
        yield server


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*QUIET, f"--user-data-dir={tmp_path}", "--window-size=1100,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def eventually(condition: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)
    return value


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def find_all(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def ask(browser: Any, question: str) -> None:
    find(browser, "#question").send_keys(question + "\n")


def is_done(browser: Any) -> bool:
    return find(browser, "#send").is_displayed() and not find_all(browser, ".running")


def set_fields(browser: Any, **values: str) -> None:
    for name, value in values.items():
        browser.execute_script(f"document.getElementById('{name}').value = arguments[0]", value)


def shot(browser: Any, name: str) -> None:
    if directory := os.environ.get("FLACUNA_SCREENSHOTS"):
        browser.save_screenshot(str(Path(directory) / f"{name}.png"))


def test_two_models_answer_side_by_side(browser: Any, server: Running) -> None:
    """Typing, streaming, token probabilities, a second question, a phone's width, no request to other hosts."""
    browser.get(server.url)
    eventually(lambda: len(find_all(browser, "#model option")) == 3)
    set_fields(browser, model="small", beside="base", temperature="0", max_tokens="30", system="Tell a story.")
    ask(browser, "One day, Lily saw a dog.")
    eventually(lambda: is_done(browser))
    answers = find_all(browser, ".text")
    assert len(answers) == 2
    assert answers[0].text != answers[1].text
    assert [name.text for name in find_all(browser, ".name span:first-child")] == ["small", "base"]
    assert "30 tokens" in find(browser, ".speed").text
    token = find(browser, ".text span")
    webdriver.ActionChains(browser).move_to_element(token).perform()
    assert "%" in eventually(lambda: find(browser, "#tip").text)
    shot(browser, "side-by-side")
    ask(browser, "And then?")
    eventually(lambda: len(find_all(browser, ".turn")) == 2 and is_done(browser))
    browser.set_window_size(500, 800)
    assert not browser.execute_script("return document.documentElement.scrollWidth > innerWidth")
    shot(browser, "narrow")
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    shot(browser, "dark")
    hosts = browser.execute_script("return performance.getEntriesByType('resource').map(e => new URL(e.name).host)")
    assert set(hosts) == {server.url.removeprefix("http://").rstrip("/")}
    messages = [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
    assert messages == []


def test_stop_ends_the_answer_and_frees_the_row(browser: Any, server: Running) -> None:
    browser.get(server.url)
    eventually(lambda: len(find_all(browser, "#model option")) == 3)
    set_fields(browser, temperature="1", max_tokens="300")
    ask(browser, "Tell a long story.")
    eventually(lambda: find(browser, "#stop").is_displayed())
    find(browser, "#stop").click()
    eventually(lambda: is_done(browser))
    eventually(lambda: server.scheduler.busy == 0)
    assert not find_all(browser, ".error")


def test_a_failing_server_is_shown(browser: Any, server: Running) -> None:
    browser.get(server.url)
    eventually(lambda: len(find_all(browser, "#model option")) == 3)
    set_fields(browser, max_tokens="9000")
    ask(browser, "Hello")
    assert "exceeds the 400 tokens" in eventually(lambda: [e.text for e in find_all(browser, ".error")])[0]
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    ask(browser, "Hello")
    eventually(lambda: len(find_all(browser, ".error")) == 2)
    assert find_all(browser, ".error")[1].text == "the server cannot be reached"
    shot(browser, "failed")
