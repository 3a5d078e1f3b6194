"""The page works in a real browser: models by key, a streamed chat, stop, pictures, and it reads well aloud.

Chromium comes from the system (`apt-get install chromium-headless-shell`, or `chromium`), its driver from the
`test` extra (`playwright`); `MODELYARD_CHROMIUM` names another one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from tests.serving.gateway.backends import RuleBackend, answer_to
from tests.serving.gateway.running import Running, running, wait_until
from tests.serving.gateway.test_predict import picture

from modelyard.errors import InputError
from modelyard.security import KeyStore
from modelyard.serving.gateway import GatewaySettings

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = os.environ.get("MODELYARD_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("NO BROWSER, the page is untested: apt-get install -y chromium-headless-shell")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def backend() -> RuleBackend:
    return RuleBackend(delay_s=0.005)


@pytest.fixture(scope="module")
def gateway(backend: RuleBackend, database: str) -> Iterator[Running]:
    with running(backend, GatewaySettings(database=database)) as found:
        yield found


@pytest.fixture
def page(browser: Browser, gateway: Running) -> Iterator[Page]:
    """The page, which must not write an error to the console nor ask anyone but the gateway."""
    found = browser.new_page()
    found.set_default_timeout(10_000)
    problems: list[str] = []
    found.on("pageerror", lambda error: problems.append(str(error)))
    own = (gateway.url, "data:", "blob:")
    found.on("request", lambda asked: None if asked.url.startswith(own) else problems.append(asked.url))
    found.on("console", lambda line: problems.append(line.text) if _is_problem(line) else None)
    found.goto(gateway.url)
    yield found
    found.close()
    assert problems == []


def _is_problem(line: ConsoleMessage) -> bool:
    return line.type == "error" and "the server responded with a status of 4" not in line.text


def connect(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Connect").click()


def test_a_key_shows_its_models_and_a_chat_streams(page: Page, keys: KeyStore, backend: RuleBackend) -> None:
    connect(page, keys.create(tenant="t", models=["tiny-*"]))
    expect(page.get_by_role("status")).to_have_text("2 models for this key.")
    assert page.get_by_label("Model", exact=True).locator("option").all_inner_texts() == ["tiny-gpt", "tiny-plain"]
    page.get_by_text("Sampling").click()
    page.get_by_label("Longest answer").fill("30")
    page.get_by_label("Message", exact=True).fill("say hello")
    page.get_by_role("button", name="Send").click()
    answer = answer_to("user say hello", 30)
    expect(page.locator(".turns li.assistant")).to_contain_text(answer.strip())
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^30 tokens in \d+\.\d s\.$"))
    page.get_by_label("Message", exact=True).fill("and again")
    page.get_by_label("Message", exact=True).press("Enter")
    expect(page.locator(".turns li")).to_have_count(4)
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^30 tokens"))
    assert [m["content"] for m in backend.generations[-1].messages or ()] == ["say hello", answer, "and again"]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turns li")).to_have_count(0)


def test_the_stop_button_stops_the_model(page: Page, key: str, backend: RuleBackend) -> None:
    connect(page, key)
    page.get_by_label("Model", exact=True).select_option("tiny-gpt")
    page.get_by_text("Sampling").click()
    page.get_by_label("Longest answer").fill("2000")
    page.get_by_label("Message", exact=True).fill("a long story")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".turns li.assistant")).to_contain_text(answer_to("user a long story", 3).strip())
    assert backend.running == 1
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    wait_until(lambda: backend.running == 0)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_pictures_are_classified(page: Page, key: str) -> None:
    connect(page, key)
    page.get_by_label("Model", exact=True).select_option("digits")
    expect(page.get_by_label("Message", exact=True)).to_be_hidden()
    files = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": picture(value=n)} for n in (3, 8)]
    page.get_by_label("Pictures to classify").set_input_files(files)  # type: ignore[arg-type]
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.locator(".answers li")).to_have_count(2)
    expect(page.locator(".answers li").nth(1)).to_contain_text("label: 8")
    expect(page.get_by_role("img", name="8.png")).to_be_visible()


def test_errors_are_told_on_the_page(page: Page, keys: KeyStore) -> None:
    connect(page, "my-000000000000-" + "A" * 43)
    expect(page.get_by_role("status")).to_have_text("this is no API key of this gateway")
    connect(page, keys.create(tenant="t", requests_per_minute=1))
    page.get_by_label("Model", exact=True).select_option("tiny-gpt")
    for number in range(2):
        page.get_by_label("Message", exact=True).fill(f"hello {number}")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("status")).to_have_text(re.compile("tokens in|requests per minute"))
    expect(page.get_by_role("status")).to_contain_text("limit 1")
    expect(page.locator(".turns li.assistant")).to_have_count(1)


def test_a_question_that_got_no_answer_comes_back_to_be_sent_again(page: Page, key: str, backend: RuleBackend) -> None:
    connect(page, key)
    page.get_by_label("Model", exact=True).select_option("tiny-gpt")
    backend.error = InputError("the prompt is too long", "shorten it")
    page.get_by_label("Message", exact=True).fill("hello")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("status")).to_contain_text("the prompt is too long")
    backend.error = None
    expect(page.locator(".turns li")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_have_value("hello")


def test_the_message_field_and_the_outcome_stay_in_view_of_a_long_answer(page: Page, key: str) -> None:
    connect(page, key)
    page.get_by_label("Model", exact=True).select_option("tiny-gpt")
    page.set_viewport_size({"width": 390, "height": 600})
    page.get_by_label("Message", exact=True).fill("at length")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("status")).to_contain_text("256 tokens")
    assert page.evaluate("document.documentElement.scrollHeight") > 900
    expect(page.get_by_role("status")).to_be_in_viewport()
    expect(page.get_by_role("button", name="Send")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollHeight - scrollY - innerHeight") < 5, "it followed the text"


def test_a_model_that_makes_no_text_offers_no_chat(page: Page, key: str) -> None:
    connect(page, key)
    page.get_by_label("Model", exact=True).select_option("minilm")
    expect(page.get_by_label("Message", exact=True)).to_be_hidden()
    expect(page.get_by_text("This model answers through the API alone.")).to_be_visible()


def test_text_of_a_model_is_never_markup(page: Page, key: str, backend: RuleBackend) -> None:
    connect(page, key)
    page.get_by_label("Model", exact=True).select_option("tiny-gpt")
    page.get_by_label("Message", exact=True).fill("<img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".turns li.user")).to_contain_text("<img src=x")
    assert page.locator(".turns img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_every_control_has_a_name_and_every_text_contrast(
    page: Page, gateway: Running, key: str, path: str, scheme: str
) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(gateway.url + path)
    if path == "/":
        connect(page, key)
        expect(page.get_by_role("status")).to_contain_text("models for this key")
    else:
        expect(page.locator(".call").first).to_be_visible()
    assert page.evaluate(UNNAMED) == []
    assert page.evaluate(FAINT) == []
    assert page.evaluate("document.documentElement.lang") == "en"


def test_the_page_fits_a_phone(page: Page, key: str) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    connect(page, key)
    expect(page.get_by_role("status")).to_contain_text("models for this key")
    assert page.evaluate("document.documentElement.scrollWidth <= 360")


def test_the_docs_list_every_call(page: Page, gateway: Running) -> None:
    page.goto(f"{gateway.url}/docs")
    for call in ("POST /v1/chat/completions", "POST /v1/predict/{model}", "GET /v1/models"):
        expect(page.get_by_text(call, exact=True)).to_be_visible()
    page.get_by_text("application/json ChatBody").click()
    expect(page.get_by_role("cell", name="temperature")).to_be_visible()


def test_the_page_may_load_nothing_from_elsewhere(gateway: Running) -> None:
    reply = gateway.ask("/")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert b"http://" not in reply.body.replace(b"http://www.w3.org", b"")
    assert b"https://" not in reply.body


UNNAMED = """() => [...document.querySelectorAll('input, select, textarea, button, a, img')]
  .filter((e) => e.offsetParent !== null || e.tagName === 'A')
  .filter((e) => !(e.labels?.length || e.textContent.trim() || e.alt || e.getAttribute('aria-label')))
  .map((e) => e.outerHTML)"""

FAINT = """() => {
  const number = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const back = (e) => {
    for (; e; e = e.parentElement) {
      const colour = number(getComputedStyle(e).backgroundColor);
      if (colour[3] === undefined || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('body *')]
    .filter((e) => e.offsetParent !== null && !e.disabled)
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
    .map((e) => {
      const [a, b] = [light(number(getComputedStyle(e).color)), light(back(e))].sort((x, y) => y - x);
      return [e.textContent.trim().slice(0, 40), (a + 0.05) / (b + 0.05)];
    })
    .filter(([, ratio]) => ratio < 4.5);
}"""
