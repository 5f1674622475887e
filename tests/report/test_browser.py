"""The page in a browser, opened from disk without a network: what is drawn, what the filters do, hostile text."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request, sync_playwright
from test_page import HOSTILE, make_corpus

import noisyclean as nc
from noisyclean.report.page import report

SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
FIGURES = ["match-scores", "kept", "energy-entropy", "truth-curves", "truth-realised"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, or Playwright's own."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            # The sandbox needs rights that containers lack; the rest keeps Chromium from calling home.
            switches = [
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
            ]
            browser = playwright.chromium.launch(executable_path=found, args=switches)
        except Error as error:
            if "NOISYCLEAN_NEEDS_BROWSER" in os.environ:
                raise
            pytest.skip(f"no browser: {error.message.splitlines()[0]}; install chromium")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page, with all of the hostile captions in its galleries."""
    root = make_corpus(tmp_path_factory.mktemp("corpus"))
    return report(root / "out")


class Visit:
    """A page that is open, and what it complained of and asked for meanwhile."""

    def __init__(self, browser: Browser, path: Path, size: str = "wide", scheme: str = "light") -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if scheme == "dark" else "light",
            offline=True,
        )
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._requested)
        self.page.goto(path.as_uri())

    def _heard(self, message: ConsoleMessage) -> None:
        self.complaints.append(message.text)

    def _requested(self, request: Request) -> None:
        if not request.url.startswith("data:"):
            self.asked.append(request.url)

    def shown(self) -> int:
        return int(self.page.locator(".card:visible").count())


@pytest.fixture
def visit(browser: Browser, path: Path) -> Iterator[Visit]:
    visit = Visit(browser, path)
    yield visit
    visit.context.close()
    assert visit.complaints == []
    assert visit.asked == [path.as_uri()]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn(browser: Browser, path: Path, size: str, scheme: str) -> None:
    visit = Visit(browser, path, size, scheme)
    try:
        backgrounds = []
        for name in FIGURES:
            drawn = visit.page.locator(f"#figure-{name} svg").screenshot()
            pixels = np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB")).reshape(-1, 3).astype(int)
            background = np.median(pixels, axis=0)
            backgrounds.append(background.mean())
            ink = np.abs(pixels - background).max(axis=1) > 60
            assert 0.005 < ink.mean() < 0.6, name
            # Text and axes are in the colour of the text, curves and bars in another one.
            assert (np.ptp(pixels[ink], axis=1) > 80).mean() > 0.05, name
            assert (np.ptp(pixels[ink], axis=1) < 20).mean() > 0.05, name
        assert (max(backgrounds) < 60) if scheme == "dark" else (min(backgrounds) > 200)
        width = visit.page.evaluate("document.documentElement.scrollWidth")
        assert width == SIZES[size][0]
        assert visit.complaints == []
    finally:
        visit.context.close()


def test_every_picture_is_shown(visit: Visit) -> None:
    widths = visit.page.evaluate("[...document.images].map(one => one.complete ? one.naturalWidth : 0)")
    assert len(widths) > 50
    assert min(widths) > 0


def test_filters(visit: Visit) -> None:
    page = visit.page
    every = visit.shown()
    assert page.locator("output").inner_text() == f"{every} of {every} pairs shown"
    page.get_by_role("combobox", name="Split").select_option("noisy")
    noisy = page.locator(".card[data-split=noisy]").count()
    assert visit.shown() == noisy == page.locator(".card[data-split=noisy]:visible").count()
    assert 0 < noisy < every
    page.get_by_role("combobox", name="Gallery").select_option("cleanest")
    assert visit.shown() == 0
    assert page.locator(".gallery:visible").count() == 0
    page.get_by_role("combobox", name="Split").select_option("")
    assert visit.shown() == 12
    assert page.locator(".gallery:visible").count() == 1


def test_search(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("searchbox").fill("ONERROR")
    assert visit.shown() > 0
    assert page.locator(".card:visible").count() == page.locator(".card:visible", has_text="onerror").count()
    page.get_by_role("searchbox").fill("onerror nowhere")
    assert visit.shown() == 0
    page.get_by_role("searchbox").fill("00002/")
    assert all("00002/" in text for text in page.locator(".card:visible .key").all_inner_texts())
    assert visit.shown() > 0


def test_keyboard_alone(visit: Visit) -> None:
    page = visit.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(40):
        if page.evaluate("document.activeElement.type") == "search":
            break
        page.keyboard.press("Tab")
    page.keyboard.type("onerror")
    assert 0 < visit.shown() < page.locator(".card").count()
    page.keyboard.press("Enter")  # submits nothing
    assert page.url == visit.asked[0]


def test_hostile_captions_are_text(visit: Visit) -> None:
    page = visit.page
    captions = page.locator(".caption").all_text_contents()
    assert HOSTILE[0] in captions
    assert page.locator(".caption img, .caption b, .caption script").count() == 0
    assert page.title() != "1"
    arabic = page.locator(".caption", has_text="مرحبا").first
    assert arabic.evaluate("one => getComputedStyle(one).direction") == "rtl"
    assert arabic.evaluate("one => getComputedStyle(one).unicodeBidi") == "isolate"
    assert "\u202e" not in arabic.text_content()
    assert max(map(len, captions)) <= 400


def test_text_stands_out(visit: Visit) -> None:
    """All text has a contrast of at least 4.5 to what is behind it, in both schemes."""
    for scheme in ("light", "dark"):
        visit.page.emulate_media(color_scheme=scheme)
        colours = visit.page.evaluate("""() => {
            const page = getComputedStyle(document.body).backgroundColor;
            const behind = (one) => {
                for (; one; one = one.parentElement) {
                    const colour = getComputedStyle(one).backgroundColor;
                    if (colour !== "rgba(0, 0, 0, 0)") return colour;
                }
                return page;
            };
            const texts = "p, th, td, dt, dd, a, h1, h2, h3, small, label, output, summary, figcaption, .why, .damage";
            const pair = (one) => getComputedStyle(one).color + "/" + behind(one);
            return [...new Set([...document.querySelectorAll(texts)].map(pair))];
        }""")
        assert len(colours) > 3
        for pair in colours:
            front, back = (_luminance(one) for one in pair.split("/"))
            assert (max(front, back) + 0.05) / (min(front, back) + 0.05) >= 4.5, (scheme, pair)


def _luminance(colour: str) -> float:
    channels = np.array([int(one) for one in colour.strip("rgba()").split(",")[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_page_of_a_fit(browser: Browser, tmp_path: Path) -> None:
    nc.generate_corpus(tmp_path / "shards", pairs=200, pairs_per_shard=100, image_size=32, seed=3)
    small = [
        "encoder.image_size=32",
        "optimiser.epochs=2",
        "objective.warmup_epochs=1",
        "bank.size=64",
        "data.workers=0",
    ]
    nc.fit(tmp_path / "shards", out=tmp_path / "run", overrides=small)
    visit = Visit(browser, report(tmp_path / "run"))
    try:
        words = visit.page.inner_text("main")
        assert "200 pairs were fitted" in " ".join(words.split())
        assert visit.page.locator("figure svg").count() == 5
        assert visit.complaints == []
    finally:
        visit.context.close()
