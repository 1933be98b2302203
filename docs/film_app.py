"""Takes the pictures of docs/app.md: a page of examples/app.py in Chromium, and a text while it is being written.

python docs/film_app.py --model outputs/quickstart          # `make pictures`
"""

import io
import shutil
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from app import STYLE, load

IMAGES = Path(__file__).parent / "images"

CHROMIUM_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SECONDS_A_FRAME = 0.35


def film(page: Page) -> list[Image.Image]:
    """The two texts side by side, after each forward, by the slider."""
    last = int(page.input_value("#steps input[type=number]"))
    frames = []
    for number in range(last + 1):
        page.fill("#steps input[type=number]", str(number))
        page.press("#steps input[type=number]", "Enter")
        page.wait_for_timeout(250)
        frames.append(Image.open(io.BytesIO(page.locator("#texts").screenshot())).convert("RGB"))
    height = max(frame.height for frame in frames)
    padded = []
    for frame in frames:
        canvas = Image.new("RGB", (frame.width, height), "white")
        canvas.paste(frame)
        padded.append(canvas.quantize(64))
    return padded


def main(model: str) -> None:
    demo = load(model).build()
    _, url, _ = demo.launch(prevent_thread_lock=True, css=STYLE, quiet=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_OPTIONS)
        page = browser.new_page(viewport={"width": 1100, "height": 1300})
        page.goto(url)
        page.wait_for_selector("#write")
        page.check("#both input")
        page.wait_for_timeout(500)
        page.click("#write")
        page.wait_for_function("document.querySelector('#text-B')?.innerText.includes('tokens')")
        while " writes" in page.inner_text("#text-A") + page.inner_text("#text-B"):
            time.sleep(0.2)
        page.wait_for_timeout(500)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        picture.quantize(128).save(IMAGES / "app.png", optimize=True)
        frames = film(page)
        pauses = [int(1000 * SECONDS_A_FRAME)] * (len(frames) - 1) + [2500]
        frames[0].save(
            IMAGES / "app.gif", save_all=True, append_images=frames[1:], duration=pauses, loop=0, optimize=True
        )
        browser.close()
    demo.close()
    print(*(f"{path.name}: {path.stat().st_size // 1024} KiB" for path in (IMAGES / "app.png", IMAGES / "app.gif")))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--model", default="outputs/quickstart")
    main(parser.parse_args().model)
