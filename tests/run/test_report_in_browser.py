"""A report in a real browser: silent, asking for nothing, its images there, readable wide and narrow, light and dark."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from selenium import webdriver

import ddkit
from tests.conftest import SMALL

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--force-color-profile=srgb")
VIEWS = [(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")]
ONE_PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
# A JavaScript expression: what can be seen of the page, an object of lists, each of which names what is wrong there.
AUDIT = """(() => {
  const channels = colour => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return {r, g, b, a}; };
  const light = ({r, g, b}) => [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const under = element => { for (let e = element; e; e = e.parentElement) {
    const colour = channels(getComputedStyle(e).backgroundColor); if (colour.a === 1) return colour; }
    return channels('rgb(255, 255, 255)'); };
  const ratio = (a, b) => { const [low, high] = [light(a), light(b)].sort((x, y) => x - y); return (high + 0.05) / (low + 0.05); };
  const found = {overflow: [], broken: [], smooth: [], squeezed: [], small: [], pale: [], faint: [], covered: [], cut: []};
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) found.overflow.push(`${wide} > ${innerWidth}`);
  for (const image of document.images) {
    if (!image.complete || !image.naturalWidth) found.broken.push(image.alt || image.src.slice(0, 60));
    if (getComputedStyle(image).imageRendering !== 'pixelated') found.smooth.push(image.alt);
    const {width} = image.getBoundingClientRect();
    if (width && width !== image.naturalWidth) found.squeezed.push(`${image.alt}: ${width} of ${image.naturalWidth}`);
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, words = node.data.trim(), element = node.parentElement;
    if (!words || !element.checkVisibility()) continue;
    const style = getComputedStyle(element), svg = element instanceof SVGElement;
    const size = parseFloat(style.fontSize) * (svg ? element.getScreenCTM().a || Math.abs(element.getScreenCTM().b) : 1);
    if (size < 11.95) found.small.push(`${words.slice(0, 40)}: ${size.toFixed(1)} px`);
    const contrast = ratio(channels(svg ? style.fill : style.color), under(element));
    if (contrast < 4.5) found.pale.push(`${words.slice(0, 40)}: ${contrast.toFixed(2)}`);
  }
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect(), ground = under(svg);
    const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([words, box], i) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        found.cut.push(words);
      for (const [other, next] of boxes.slice(i + 1))
        if (box.left < next.right - 1 && next.left < box.right - 1 && box.top + 3 < next.bottom - 3 && next.top + 3 < box.bottom - 3)
          found.covered.push(`${words} / ${other}`);
    });
    for (const mark of svg.querySelectorAll('path, use')) {
      const style = getComputedStyle(mark), colour = style.fill === 'none' ? style.stroke : style.fill;
      if (mark.closest('defs') || colour === 'none' || mark.getAttribute('style')?.includes('var(--line)')) continue;
      if (ratio(channels(colour), ground) < 3) found.faint.push(`${mark.tagName}: ${colour}`);
    }
  }
  return found;
})()"""


class Seen(NamedTuple):
    """What happened while a page was open: `messages` of its console, `requests` for anything but the page itself and data in it."""

    messages: list[str]
    requests: list[str]


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.ask = driver.execute_cdp_cmd
        self.ask("Emulation.setScrollbarsHidden", {"hidden": True})

    def show(self, width: int, scheme: str) -> None:
        """Makes the page `width` CSS pixels wide, in the colour scheme "light" or "dark"."""
        self.ask("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
        self.ask("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})

    def open(self, file: Path) -> Seen:
        """Opens a file, waits for it and its images, and returns what happened."""
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # what there was before
        address = file.resolve().as_uri()
        self.driver.get(address)
        self.driver.execute_async_script("Promise.allSettled([...document.images].map(image => image.decode())).then(() => arguments[0]())")
        messages = [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        requests = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return Seen(messages, [url for url in requests if url != address and not url.startswith("data:")])

    def run(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression."""
        return self.driver.execute_script(f"return {expression}")

    def wrong(self) -> dict[str, list[str]]:
        """Returns what cannot be seen well of the page, by what is wrong with it."""
        return {what: found for what, found in self.run(AUDIT).items() if found}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = [os.environ["DDKIT_BROWSER"]] if os.environ.get("DDKIT_BROWSER") else NAMES
    path, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if path is None or driver is None:
        pytest.skip(f"no browser: {'chromedriver' if path else ' or '.join(names)} is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = path
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield Browser(started)
    started.quit()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run on 8 x 8 digits with multipliers, evaluated by all evaluators with several networks."""
    path = tmp_path_factory.mktemp("digits") / "run"
    sets = SMALL | {"steps": 20, "engine.log_every": 1, "evaluators.accuracy.model": "convnet,mlp"}
    ddkit.distill(
        losses="dm:0.01,dkkt:0.5", ipc=10, pipc=12, evaluators="accuracy,memorisation,spectrum", sets=sets, out=path, device="cpu"
    )
    return path


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run on 32 x 32 coloured images whose class names are long, short and of other letters."""
    folder = tmp_path_factory.mktemp("coloured")
    names = np.array(["airplane", "x" * 90, "ein langer Name mit Leerzeichen", "中文 ü"])
    images = np.random.default_rng(0).integers(0, 255, (32, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(32) % 4
    np.savez(folder / "colours.npz", x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8], class_names=names)
    sets = SMALL | {"evaluators.accuracy.model_options.width": 4, "network.width": 4, "network.depth": 2}
    ddkit.distill(dataset=f"npz:{folder / 'colours.npz'}", losses="dm", ipc=1, pipc=4, sets=sets, out=folder / "run", device="cpu")
    return folder / "run"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run on images of 96 x 130 pixels."""
    folder = tmp_path_factory.mktemp("large")
    images = np.random.default_rng(0).integers(0, 255, (12, 96, 130, 3), dtype=np.uint8)
    labels = np.arange(12) % 2
    np.savez(folder / "large.npz", x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2])
    ddkit.distill(dataset=f"npz:{folder / 'large.npz'}", losses="dm", ipc=4, pipc=6, evaluators="none",
                  sets={"steps": 1, "network.width": 2}, out=folder / "run", device="cpu")  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def both(coloured: Path) -> Path:
    return ddkit.blend(coloured, coloured, alpha=0.25, out=coloured.parent / "both").path


@pytest.mark.parametrize("name", ["digits", "coloured", "large", "both"])
def test_a_report_is_silent_whole_and_readable_wide_and_narrow_light_and_dark(
    browser: Browser, request: pytest.FixtureRequest, name: str
) -> None:
    file = request.getfixturevalue(name) / "report.html"
    grounds = set()
    for width, scheme in VIEWS:
        browser.show(width, scheme)
        assert browser.open(file) == Seen([], []), (width, scheme)
        assert browser.run("[innerWidth, document.images.length > 1]") == [width, True]
        assert browser.wrong() == {}, (width, scheme)
        grounds.add((scheme, browser.run("getComputedStyle(document.body).backgroundColor")))
    assert grounds == {("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 26)")}


@pytest.mark.parametrize(("name", "pixels"), [("digits", 9), ("coloured", 5)])
def test_a_pixel_of_a_small_image_is_a_square_of_several_on_the_page(
    browser: Browser, request: pytest.FixtureRequest, name: str, pixels: int
) -> None:
    run = request.getfixturevalue(name)
    side, across = ddkit.load(run).images.shape[-1], {"digits": 5, "coloured": 1}[name]
    browser.show(400, "light")
    browser.open(run / "report.html")
    wanted = across * (side * pixels + 2) - 2
    assert browser.run("document.querySelector('.images img').getBoundingClientRect().width") == wanted <= 368


def test_the_recipe_opens_without_making_the_page_wider(browser: Browser, digits: Path) -> None:
    browser.show(400, "dark")
    browser.open(digits / "report.html")
    browser.run("document.querySelector('summary').click()")
    assert browser.run("document.querySelector('pre').checkVisibility()")
    assert browser.wrong() == {}


def test_a_page_on_paper_is_no_wider_than_it(browser: Browser, digits: Path) -> None:
    browser.show(700, "light")
    browser.ask("Emulation.setEmulatedMedia", {"media": "print"})
    browser.open(digits / "report.html")
    assert "overflow" not in browser.wrong()
    browser.ask("Emulation.setEmulatedMedia", {"media": ""})


# What is wrong would be noticed


def opened(browser: Browser, file: Path, body: str) -> Seen:
    file.write_text(f'<!doctype html><meta charset="utf-8"><style>img {{image-rendering: pixelated}}</style><body>{body}', encoding="utf-8")
    browser.show(400, "light")
    return browser.open(file)


def test_a_page_that_asks_for_something_from_outside_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    seen = opened(browser, tmp_path / "a.html", '<img src="http://127.0.0.1:9/x.png">')
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert opened(browser, tmp_path / "b.html", "nothing") == Seen([], [])
    (tmp_path / "c.css").write_text("p {color: red}")
    seen = opened(browser, tmp_path / "c.html", '<link rel="stylesheet" href="c.css"><p>red')
    assert seen.requests == [(tmp_path / "c.css").as_uri()]


def test_the_policy_of_a_report_lets_nothing_from_outside_in(browser: Browser, digits: Path, tmp_path: Path) -> None:
    content = (digits / "report.html").read_text(encoding="utf-8")
    (tmp_path / "r.html").write_text(content.replace("</main>", '<img src="http://127.0.0.1:9/x.png"><script>x()</script></main>'), "utf-8")
    seen = browser.open(tmp_path / "r.html")
    assert len(seen.messages) >= 2
    assert all("Content Security Policy" in message for message in seen.messages)


def test_messages_of_the_console_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    seen = opened(browser, tmp_path / "a.html", "<script>console.warn('careful'); nothing()</script>")
    assert [words in " ".join(seen.messages) for words in ("careful", "nothing is not defined")] == [True, True]


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("overflow", '<div style="width: 500px">wide</div>'),
        ("broken", '<img src="data:image/png;base64,AAAA">'),
        ("smooth", f'<img style="image-rendering: auto" src="{ONE_PIXEL}">'),
        ("squeezed", f'<img style="width: 3px" src="{ONE_PIXEL}">'),
        ("small", '<p style="font-size: 11px">small'),
        ("small", '<svg viewBox="0 0 800 100"><text y="50" font-size="15">small</text></svg>'),
        ("pale", '<p style="color: #999">pale'),
        ("pale", '<svg viewBox="0 0 80 40"><text y="30" fill="#999">pale</text></svg>'),
        ("faint", '<svg viewBox="0 0 80 40"><path d="M0 0H9V9z" fill="#ddd"/></svg>'),
        ("cut", '<svg viewBox="0 0 80 40"><text x="60" y="20">a long name</text></svg>'),
        ("covered", '<svg viewBox="0 0 80 40"><text y="20">one</text><text x="5" y="20">two</text></svg>'),
    ],
)
def test_what_cannot_be_seen_well_would_be_noticed(browser: Browser, tmp_path: Path, what: str, body: str) -> None:
    opened(browser, tmp_path / "a.html", body)
    assert what in browser.wrong()
