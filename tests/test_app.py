"""examples/app.py in a real browser: writing is seen while it goes on, and what is written is the model's."""

import math
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import app
import pytest
import torch
from app import App, Settings, Writing
from app_view import STYLE, bound
from playwright.sync_api import expect, sync_playwright
from tiny_models import save_with_tokenizer
from transformers import AutoModel, AutoTokenizer

from eso_lm import generation_decoding

ROOT = Path(app.__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PAUSE = 0.06
pytestmark = pytest.mark.slow
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_with_tokenizer(folder, max_position_embeddings=64, scale=0.1)
    return folder


@pytest.fixture(scope="module")
def site(folder):
    """The app, and the address of its page."""
    served = app.load(str(folder))
    page = served.build()
    _, url, _ = page.launch(prevent_thread_lock=True, css=STYLE, quiet=True)
    yield served, url
    page.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, site):
    """Opens the page as a new visitor."""
    contexts = []

    def open_page():
        context = browser.new_context(viewport={"width": 1200, "height": 1500})
        contexts.append(context)
        page = context.new_page()
        page.goto(site[1])
        page.wait_for_selector("#write")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def slow(monkeypatch):
    """Forwards take long enough to be seen one by one."""
    decode = generation_decoding.Decoder.__call__

    def slowly(self, feed):
        time.sleep(PAUSE)
        return decode(self, feed)

    monkeypatch.setattr(generation_decoding.Decoder, "__call__", slowly)


def set_number(page, selector, value):
    page.fill(f"{selector} input[type=number]", str(value))
    page.press(f"{selector} input[type=number]", "Enter")


def write(page, prompt, new_tokens, side="A", **settings):
    page.fill("#prompt textarea", prompt)
    set_number(page, "#new-tokens", new_tokens)
    for label, value in settings.items():
        page.locator(f"#settings-{side}").get_by_label(f"number input for {label}").fill(str(value))
        page.keyboard.press("Tab")
    page.click("#write")


def wait_until_written(page, tokens, side="A"):
    expect(page.locator(f"#text-{side} .counts")).to_contain_text(f" {tokens} of {tokens} tokens", timeout=20000)
    expect(page.locator(f"#text-{side} i")).to_have_text("", timeout=20000)


def shown_text(page, side="A"):
    """The tokens on the page, without drafts and refusals."""
    spans = page.locator(f"#text-{side} .text span.given, #text-{side} .text span.new, #text-{side} .text span.open")
    return "".join(spans.all_text_contents()).replace("⏎", "")


def expected_text(site, prompt, new_tokens, seed=0, **settings):
    served, _ = site
    ids = served.encode(prompt, new_tokens)
    output = served.model.generate(
        ids if ids.shape[1] else None, max_new_tokens=new_tokens, alpha_0=1.0, temperature=1.0,
        generator=torch.Generator().manual_seed(seed), return_dict_in_generate=True, **settings,
    )  # fmt: skip
    tokens = output.sequences[0].tolist()
    while tokens and tokens[-1] == served.tokenizer.pad_token_id:
        tokens.pop()
    return "".join(served.tokenizer.decode([token]) for token in tokens)


@needs_browser
def test_a_text_is_seen_while_it_is_written(visit, site, slow):
    page = visit()
    write(page, "The <mask:3> fox", 20, Steps=6)
    seen = []
    for _ in range(200):
        text = shown_text(page)
        if not seen or text != seen[-1]:
            seen.append(text)
        if text and "·" not in text:
            break
        time.sleep(0.02)
    wait_until_written(page, 23)
    open_tokens = [text.count("·") for text in seen if text]
    assert len(open_tokens) >= 4
    assert open_tokens == sorted(open_tokens, reverse=True)
    assert open_tokens[-1] == 0
    assert shown_text(page) == expected_text(site, "The <mask:3> fox", 20, num_diffusion_steps=6)
    counts = page.inner_text("#text-A .counts")
    assert re.match(r"6 forwards, 23 of 23 tokens, 3.8 a forward, \d+\.\d\d s", counts)
    assert float(counts.split()[-2]) > 6 * PAUSE


@needs_browser
def test_the_slider_goes_back_through_the_forwards(visit, site):
    page = visit()
    write(page, "The <mask:2> fox", 12, Steps=5)
    wait_until_written(page, 14)
    final = shown_text(page)
    last = int(page.input_value("#steps input[type=number]"))
    counts = []
    for number in range(last + 1):
        set_number(page, "#steps", number)
        expect(page.locator("#text-A .counts b").first).to_have_text(str(number))
        counts.append(shown_text(page).count("·"))
    assert counts[0] == 14
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert shown_text(page) == final
    set_number(page, "#steps", 1)
    token = page.locator("#text-A .text span.new").first
    by_forward = token.evaluate("token => getComputedStyle(token).backgroundColor")
    page.locator("#coloring").get_by_label("probability").check()
    page.wait_for_function(
        "old => getComputedStyle(document.querySelector('#text-A .text .new')).backgroundColor != old", arg=by_forward
    )
    assert page.locator("#text-A .counts b").first.inner_text() == "1"


@needs_browser
def test_a_cancelled_text_stays_as_it_is_and_another_can_be_written(visit, site, slow):
    page = visit()
    write(page, "", 60, Steps=60)
    expect(page.locator("#text-A .text span.new")).not_to_have_count(0, timeout=10000)
    expect(page.locator("#steps input[type=number]")).to_be_disabled()
    page.click("#cancel")
    expect(page.locator("#text-A i")).to_have_text("cancelled", timeout=10000)
    left = shown_text(page).count("·")
    assert 0 < left < 60
    time.sleep(5 * PAUSE)
    assert shown_text(page).count("·") == left
    assert not site[0].turn.locked()
    set_number(page, "#steps", 1)
    expect(page.locator("#text-A .counts b").first).to_have_text("1")
    write(page, "", 6, Steps=2)
    wait_until_written(page, 6)
    assert shown_text(page) == expected_text(site, "", 6, num_diffusion_steps=2)


@needs_browser
def test_a_text_that_is_ahead_of_what_is_shown_is_cancelled_where_it_is_shown(visit):
    """The model is through at once, and every forward is shown for a while."""
    page = visit()
    write(page, "", 60, Steps=60)
    expect(page.locator("#text-A .text span.new")).not_to_have_count(0, timeout=10000)
    page.click("#cancel")
    expect(page.locator("#text-A i")).to_have_text("cancelled", timeout=10000)
    assert shown_text(page).count("·") > 30


@needs_browser
def test_who_waits_is_told_so_and_can_cancel(visit, site, slow):
    first, second = visit(), visit()
    write(first, "", 60, Steps=60)
    expect(first.locator("#text-A .text span.new")).not_to_have_count(0, timeout=10000)
    write(second, "fox", 8, Steps=4)
    expect(second.locator("#text-A i")).to_have_text("waits for its turn")
    second.click("#cancel")
    expect(second.locator("#text-A i")).to_have_text("cancelled")
    first.click("#cancel")
    expect(first.locator("#text-A i")).to_have_text("cancelled")


@needs_browser
def test_writing_again_begins_anew(visit, site, slow):
    page = visit()
    write(page, "", 60, Steps=60)
    expect(page.locator("#text-A .text span.new")).not_to_have_count(0, timeout=10000)
    write(page, "The fox", 8, Steps=4)
    wait_until_written(page, 8)
    assert shown_text(page) == expected_text(site, "The fox", 8, num_diffusion_steps=4)
    time.sleep(3 * PAUSE)
    assert shown_text(page).startswith("The fox")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_in_the_light_and_in_the_dark(browser, site, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(site[1])
    page.wait_for_selector("#write")
    write(page, "The fox", 8, Steps=2)
    wait_until_written(page, 8)
    for kind in ("given", "new"):
        color = page.locator(f"#text-A .text .{kind}").first.evaluate("token => getComputedStyle(token).color")
        assert sum(map(int, re.findall(r"\d+", color)[:3])) < 150
    background = page.locator("#text-A .text").evaluate("text => getComputedStyle(text).backgroundColor")
    assert background == "rgb(255, 255, 255)"
    page.close()


@needs_browser
def test_what_cannot_be_written_says_why(visit):
    page = visit()
    write(page, "fox " * 70, 20)
    expect(
        page.get_by_text(re.compile(r"The prompt has \d+ tokens, and 20 are to follow: together at most 64"))
    ).to_be_visible()
    page = visit()
    write(page, "<mask:1000000000>", 1)
    expect(page.get_by_text("The holes of the prompt have more tokens than the model's context, 64")).to_be_visible()
    page = visit()
    write(page, "a <mask: 5> b", 1)
    expect(page.get_by_text("A hole is written <mask:5>")).to_be_visible()
    page = visit()
    page.fill("#seed input", "")
    write(page, "fox", 4)
    expect(page.get_by_text("The seed must be a whole number from 0 to")).to_be_visible()
    page = visit()
    write(page, "fox", 0)
    expect(page.get_by_text("There is nothing to write")).to_be_visible()
    write(page, "fox", 4, Steps=2)
    wait_until_written(page, 4)


@needs_browser
def test_two_visitors_do_not_mix(visit, site, slow):
    pages, prompts = [visit(), visit()], ["The <mask:4> fox", "lazy <mask:7> dog"]
    for page, prompt in zip(pages, prompts, strict=True):
        write(page, prompt, 10, Steps=5)
    for page, prompt, tokens in zip(pages, prompts, (14, 17), strict=True):
        wait_until_written(page, tokens)
        assert shown_text(page) == expected_text(site, prompt, 10, num_diffusion_steps=5)
    other = shown_text(pages[1])
    set_number(pages[0], "#steps", 0)
    expect(pages[0].locator("#text-A .counts b").first).to_have_text("0")
    assert shown_text(pages[1]) == other
    # One cancels, the other goes on.
    for page, prompt in zip(pages, prompts, strict=True):
        write(page, prompt, 20, Steps=10)
    pages[0].click("#cancel")
    wait_until_written(pages[1], 27)
    assert shown_text(pages[1]) == expected_text(site, prompts[1], 20, num_diffusion_steps=10)
    expect(pages[0].locator("#text-A i")).to_have_text("cancelled")


@needs_browser
def test_two_settings_side_by_side_and_drafts(visit, site):
    page = visit()
    assert not page.locator("#settings-B").is_visible()
    page.check("#both input")
    expect(page.locator("#settings-B")).to_be_visible()
    write(page, "The <mask:2> fox", 24, Steps=4)
    wait_until_written(page, 26, "A")
    wait_until_written(page, 26, "B")
    assert shown_text(page, "A") == expected_text(site, "The <mask:2> fox", 24, num_diffusion_steps=4)
    kinds = set()
    for number in range(int(page.input_value("#steps input[type=number]")) + 1):
        set_number(page, "#steps", number)
        expect(page.locator("#text-B .counts b").first).to_have_text(str(number))
        kinds |= {kind for kind in ("draft", "refused") if page.locator(f"#text-B .text .{kind}").count()}
    assert "draft" in kinds  # how many are refused depends on the lengths that this machine chooses
    assert page.locator("#text-A .text .draft, #text-A .text .refused").count() == 0


@needs_browser
def test_who_leaves_is_forgotten_and_stops_what_was_being_written(visit, site, slow):
    page = visit()
    write(page, "", 60, Steps=60)
    expect(page.locator("#text-A .text span.new")).not_to_have_count(0, timeout=10000)
    assert site[0].turn.locked()
    page.close()
    deadline = time.time() + 15
    while time.time() < deadline and (site[0].turn.locked() or site[0].runs):
        time.sleep(0.05)
    assert not site[0].turn.locked()
    assert not site[0].runs


@needs_browser
def test_texts_are_scored_and_compared(visit, site):
    served, _ = site
    page = visit()
    page.get_by_role("tab", name="Score").click()
    page.fill("#score-text textarea", "The quick fox")
    page.click("#score")
    expect(page.locator("#scores .text")).to_have_count(4)
    shown = [float(text) for text in page.locator("#scores .counts b").all_text_contents()]
    ids = served.tokenizer("The quick fox", return_tensors="pt")["input_ids"]
    found = served.model.log_likelihood(ids, num_orders=4, generator=torch.Generator().manual_seed(0))
    assert shown == pytest.approx((-found.log_likelihood_per_order[0]).tolist(), abs=0.006)
    page.fill("#score-text textarea", "a <mask:2>")
    page.click("#score")
    expect(page.get_by_text("A hole is written <mask:5>")).to_be_visible()
    expect(page.locator("#scores .text")).to_have_count(0)
    page.get_by_role("tab", name="Compare").click()
    page.fill("#compare-text textarea", "The quick fox")
    page.click("#compare")
    expect(page.locator("canvas, svg.marks").last).to_be_visible(timeout=15000)


def test_what_the_tabs_say_is_the_likelihood(folder):
    served = app.load(str(folder))
    _, table = served.score("The quick fox", 0.5, 3, 1)
    ids = served.tokenizer("The quick fox", return_tensors="pt")["input_ids"]
    found = served.model.log_likelihood(ids, num_orders=3, alpha_0=0.5, generator=torch.Generator().manual_seed(1))
    assert (-table["nats"]).tolist() == pytest.approx(bound(found.log_likelihood_per_order[0]))
    assert -table["nats"].iloc[-1] == pytest.approx(found.log_likelihood.item(), abs=1e-4)
    compared = served.compare("The quick fox", 1.0, 4, 2)
    assert set(compared["order"]) == {"strided", "random"}
    for order, rows in compared.groupby("order"):
        one = rows[rows["forwards"] == 1]["nats per token"].iloc[0]
        found = served.model.log_likelihood(
            ids, num_orders=4, alpha_0=1.0, generator=torch.Generator().manual_seed(2), num_diffusion_steps=1,
            unmasking_order=order,
        )  # fmt: skip
        assert one == pytest.approx(-found.log_likelihood.item() / ids.shape[1], abs=1e-5)


def test_a_run_that_another_has_taken_the_place_of_writes_nothing(folder):
    served = app.load(str(folder))
    visitor = SimpleNamespace(session_hash="one")
    first, second = (served.begin(visitor)[0] for _ in range(2))
    settings = (1.0, 2, "automatic", 0, 1.0, False)
    assert list(served.write(visitor, first, "fox", 4, 0, 0.0, False, *settings, *settings)) == []
    written = list(served.write(visitor, second, "fox", 4, 0, 0.0, False, *settings, *settings))
    assert "4 of 4" not in written[0][0]
    assert "<b>4</b> of 4 tokens" in written[-1][0]
    served.leave(visitor)
    assert not served.runs


def test_settings_that_generate_refuses_are_told_as_it_says(folder):
    served = app.load(str(folder))
    side = Settings(alpha_0=1.0, num_steps=4, order="sideways", block_length=0, temperature=1.0, lossless=False)
    ids, event = served.encode("fox", 4), threading.Event()
    with pytest.raises(app.gr.Error, match="`unmasking_order` must be one of"):
        list(served.steps_of(Writing(), ids, 4, 0, side, event, False))
    assert not served.turn.locked()


def test_a_space_needs_the_model_and_not_the_package(folder, tmp_path):
    subprocess.run(["make", "space", f"MODEL={folder}"], cwd=ROOT, check=True, capture_output=True)
    space = ROOT / "build" / "space"
    assert {path.name for path in space.iterdir()} >= {"README.md", "requirements.txt", "app.py", "model"}
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, threading\n"
        "sys.modules['eso_lm'] = None\n"
        "import app\n"
        "served = app.load(app.DEFAULT_MODEL)\n"
        "served.build()\n"
        "side = app.Settings(1.0, 3, 'automatic', 0, 1.0, True)\n"
        "writing = app.Writing()\n"
        "list(served.steps_of(writing, served.encode('fox', 9), 9, 0, side, threading.Event(), False))\n"
        "print('steps', len(writing.steps), served.tokenizer.mask_token_id in writing.steps[-1].tokens)\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(space), "HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, script], cwd=space, capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(r"steps [3-9] False|steps 10 False", run.stdout)
    assert "Do you wish to run" not in run.stdout + run.stderr
    assert not list((space / "model").glob("*.jsonl"))


@pytest.mark.parametrize("value", [None, -1, 1.5, 2**60, math.nan, "many"])
def test_numbers_that_visitors_type_are_looked_at(value):
    with pytest.raises(app.gr.Error, match="The seed must be a whole number from 0 to 100"):
        app.whole("seed", value, 100)


def test_where_the_page_is_may_be_said_by_a_space():
    (arguments,) = app.HfArgumentParser(app.Arguments).parse_args_into_dataclasses([])
    assert arguments.host is None  # Gradio then asks the environment


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="must be the folder of an Eso-LM, or its name on the Hub, got 'nope/none'"):
        app.load("nope/none")


def test_the_model_and_tokenizer_are_those_of_the_folder(folder):
    served = app.load(str(folder))
    assert isinstance(served, App)
    assert type(served.model) is type(AutoModel.from_pretrained(folder))
    assert served.tokenizer.mask_token_id == AutoTokenizer.from_pretrained(folder).mask_token_id
