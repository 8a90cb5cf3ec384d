"""The page: nothing from elsewhere, nothing that becomes markup, and what it does in a browser (make browser)."""

import contextlib
import importlib.util
import os
import re
from pathlib import Path

import browser
import models_zoo
import pytest
from served import Reference, all_maps, create_app, make_maps, model, running, tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import lineas.serving

FILES = ("page.html", "page.css", "page.js")
SOURCES = {name: Path(lineas.serving.__file__).with_name(name).read_text(encoding="utf-8") for name in FILES}


def test_the_files_are_served_and_may_load_nothing_from_elsewhere(client):
    for path, name in (("/", "page.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):
        found = client.get(path)
        assert found.status_code == 200 and found.text == SOURCES[name]
        policy = dict(part.strip().split(" ", 1) for part in found.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"


def test_the_page_names_no_other_place_and_makes_no_markup():
    for name, source in SOURCES.items():
        assert not re.search(r"https?:|//[a-z]|@import|url\(", source.replace("// ", "")), name
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", SOURCES["page.js"])
    assert not re.search(r"<script>|\son\w+=|style=", SOURCES["page.html"])


def test_everything_to_fill_in_has_a_label():
    html = SOURCES["page.html"]
    labelled = set(re.findall(r'<label for="([\w-]+)"', html))
    for tag in re.findall(r"<(?:input|textarea)[^>]*>", html):
        inside = re.search(r"<label>[^<]*" + re.escape(tag), html) or re.search(re.escape(tag) + r" a", html)
        assert inside or re.search(r'id="([\w-]+)"', tag)[1] in labelled, tag


# ---- in a browser ----------------------------------------------------------------------------------------------------

MISSING = importlib.util.find_spec("playwright") is None or browser.chromium() is None


def in_browser(test):
    return pytest.mark.slow(pytest.mark.skipif(MISSING, reason="needs playwright, chromium: make browser")(test))


CLIPPED = """() => [...document.querySelectorAll("body *")].filter((one) =>
  one.checkVisibility() && one.getBoundingClientRect().right > innerWidth + 0.5
).map((one) => one.outerHTML.slice(0, 80))"""
# Of the text of a box, and of what is behind it, from 0 to 255.
BRIGHTNESS = """() => ["color", "backgroundColor"].map((name) => {
  const [red, green, blue] = getComputedStyle(document.querySelector("textarea"))[name].match(/[\\d.]+/g).map(Number);
  return (red + green + blue) / 3;
})"""


class Page:
    """The page of an application, with what it logged and asked for."""

    def __init__(self, page, address):
        self.page, self.messages, self.asked = page, [], []
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("dialog", lambda dialog: (self.messages.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("[data-state=idle]")

    def press_and_wait(self, *keys):
        runs = int(self.page.evaluate("document.body.dataset.runs ?? 0"))
        for key in keys:
            self.page.keyboard.press(key)
        self.page.wait_for_selector(f"[data-runs='{runs + 1}']")

    def until(self, holds):
        """Wait; the page's policy lets Playwright evaluate no conditions of its own."""
        for _ in range(1200):
            if holds():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError("it does not come")

    def made(self):
        """What stands as made on both sides, answer by answer."""
        return [self.page.locator(f"[data-side='{side}'] .made").all_inner_texts() for side in (0, 1)]

    def error(self):
        return self.page.locator("#error").inner_text()


@pytest.fixture
def opened():
    """Opens the page of an application."""
    with contextlib.ExitStack() as stack:

        def build(app):
            address = stack.enter_context(running(app))
            return Page(stack.enter_context(browser.browser()), address)

        yield build


def served(**options):
    return create_app(model(context=10**6, endless=True), tokenizer(), all_maps(), name="tiny", **options)


@in_browser
def test_chats_and_completions_by_the_keyboard(opened):
    app = served()
    tab = opened(app)
    page, alone = tab.page, Reference(model(context=10**6, endless=True))
    assert page.title() == "tiny"

    # Sliders: one a map, as far as twice the calibrated strength, by keys, by number and by button.
    slider, exact = page.get_by_role("slider", name="a", exact=True), page.get_by_label("a, as a number")
    assert [slider.get_attribute(name) for name in ("min", "max")] == ["0", "1.4"] and exact.input_value() == "1"
    slider.focus()
    page.keyboard.press("Home")
    assert exact.input_value() == "0"
    page.keyboard.press("End")
    assert exact.input_value() == "1.4"
    page.get_by_role("button", name="calibrated: 0.7, for a").press("Enter")
    assert exact.input_value() == "0.7" and slider.input_value() == "0.7"
    page.get_by_label("b, as a number").fill("0")

    # A conversation of two turns, each side with its own history.
    page.get_by_label("System message, if any").fill("we are")
    page.get_by_label("Tokens at most").fill("7")
    page.get_by_label("Temperature").fill("0")
    histories = [[{"role": "system", "content": "we are"}] for _ in range(2)]
    expected = [[], []]
    for message in ("the dog is", "my house was"):
        page.get_by_label("Message", exact=True).fill(message)
        tab.press_and_wait("Control+Enter")
        for side, history in enumerate(histories):
            history.append({"role": "user", "content": message})
            ids = alone.tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            made = alone.generate(ids, {"a": 0.7} if side else {}, max_tokens=7)
            history.append({"role": "assistant", "content": alone.tokenizer.decode(made, skip_special_tokens=True)})
            expected[side].append(f"{history[-1]['content']} (cut here)")
        assert tab.made() == expected
        assert page.get_by_label("Message", exact=True).input_value() == ""
    assert expected[0] != expected[1]
    page.get_by_role("button", name="New conversation").press("Enter")
    assert tab.made() == [[], []]

    # A completion.
    page.get_by_label("a completion").check()
    page.get_by_label("Text to continue").fill("the dog is")
    page.get_by_role("button", name="Generate").focus()
    tab.press_and_wait("Enter")
    texts = [alone.text("the dog is", strengths, max_tokens=7) for strengths in ({}, {"a": 0.7})]
    assert tab.made() == [[f"the dog is{text} (cut here)"] for text in texts]

    # Without a seed both sides draw with the same one, which is told and draws the same again.
    page.get_by_label("Temperature").fill("1.5")
    page.get_by_label("a, as a number").fill("0")
    tab.press_and_wait("Control+Enter")
    first = tab.made()
    assert first[0] == first[1]
    page.get_by_label("Seed").fill(re.search(r"seed (\d+)", page.get_by_role("status").inner_text())[1])
    tab.press_and_wait("Control+Enter")
    assert tab.made() == first

    # Esc stops both, and what was said stays.
    page.get_by_label("Tokens at most").fill("100000")
    page.keyboard.press("Control+Enter")
    tab.until(lambda: all(len(texts[-1]) > 40 for texts in tab.made()))
    page.keyboard.press("Escape")
    page.wait_for_selector("[data-state=idle]")
    assert all(text.endswith(" (stopped)") for texts in tab.made() for text in texts)
    tab.until(lambda: not app.state.engine.jobs)
    assert tab.messages == [] and all(url.startswith("http://127.0.0.1:") for url in tab.asked)


@in_browser
def test_errors_are_told(opened):
    app = served()
    tab = opened(app)
    page = tab.page
    page.get_by_label("b, as a number").fill("1e38")
    page.get_by_label("Message", exact=True).fill("the dog")
    page.get_by_label("Tokens at most").fill("5")
    tab.press_and_wait("Control+Enter")
    assert tab.error().startswith("the model's logits are not finite at the strengths")
    assert page.get_by_role("status").inner_text() == "Failed"
    page.get_by_label("b, as a number").fill("")  # what is missing is not sent
    page.keyboard.press("Control+Enter")
    assert page.evaluate("document.querySelector('form :invalid[type=number]').validity.valueMissing")
    page.get_by_label("b, as a number").fill("1")
    tab.press_and_wait("Control+Enter")
    assert tab.error() == ""
    page.get_by_label("Tokens at most").fill("100000")
    page.get_by_label("Message", exact=True).fill("the dog")
    page.keyboard.press("Control+Enter")
    tab.until(lambda: all(len(texts[-1]) > 40 for texts in tab.made()))
    app.state.engine.stop()
    page.wait_for_selector("[data-state=idle]")
    assert tab.error() == "the server is shutting down"


@in_browser
def test_hostile_text_is_text(opened):
    """Markup as the words of the model, as its name, and as that of maps."""
    words = [f"<img/src=x/onerror=alert({k})>" for k in range(len(models_zoo.WORDS))]
    vocabulary = {word: k for k, word in enumerate((*models_zoo.SPECIAL, *words))}
    core = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hostile = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")
    maps = {"<img/src=x/onerror=alert('map')>": make_maps(0)}
    app = create_app(model(context=1000), hostile, maps, name="<script>alert('name')</script>")
    tab = opened(app)
    page = tab.page
    assert page.get_by_role("heading", level=1).inner_text() == "<script>alert('name')</script>"
    assert not page.locator("#kinds").is_visible()  # no chat template
    page.get_by_label("Text to continue").fill(words[3])
    tab.press_and_wait("Control+Enter")
    assert all("onerror=alert(" in text for texts in tab.made() for text in texts)
    assert page.locator("img, main script").count() == 0
    assert tab.messages == [] and not [url for url in tab.asked if url.endswith("/x")]


@in_browser
def test_it_fits_every_width_and_scheme(opened):
    app = served()
    tab = opened(app)
    page = tab.page
    page.get_by_label("Tokens at most").fill("30")
    page.get_by_label("Message", exact=True).fill("a" * 300)
    tab.press_and_wait("Control+Enter")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        text, behind = page.evaluate(BRIGHTNESS)
        assert (text < 100 and behind > 200) if scheme == "light" else (text > 200 and behind < 100)
        for width in (360, 1100):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate(CLIPPED) == []
            if os.environ.get("LINEAS_SCREENSHOTS"):
                name = f"serve-{scheme}-{width}.png"
                page.screenshot(path=Path(os.environ["LINEAS_SCREENSHOTS"], name), full_page=True)
