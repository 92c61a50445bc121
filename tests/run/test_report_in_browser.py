"""A report in a real browser: silent, asking for nothing, its images there, readable wide and narrow, light and dark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ddkit
from tests.browser import AUDIT, NAMES, Browser, Seen, find_browser
from tests.conftest import SMALL

VIEWS = [(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")]
ONE_PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        named = os.environ.get("DDKIT_BROWSER")
        problem = f"DDKIT_BROWSER = {named} is none" if named else f"none of {', '.join(NAMES)} is installed"
        pytest.skip(f"no browser: {problem}")
    with Browser(path, tmp_path_factory.mktemp("browser") / "profile") as started:
        yield started


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
        assert {what: found for what, found in browser.run(AUDIT).items() if found} == {}, (width, scheme)
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
    assert {what: found for what, found in browser.run(AUDIT).items() if found} == {}


def test_a_page_on_paper_is_no_wider_than_it(browser: Browser, digits: Path) -> None:
    browser.show(700, "light")
    browser.ask("Emulation.setEmulatedMedia", media="print")
    browser.open(digits / "report.html")
    assert browser.run(AUDIT)["overflow"] == []
    browser.ask("Emulation.setEmulatedMedia", media="")


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
    assert seen.messages[0] == "warning: ['careful']"
    assert any(message.startswith("exception") for message in seen.messages)


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
        ("faint", '<svg viewBox="0 0 80 40"><circle r="9" fill="#ddd"/></svg>'),
        ("cut", '<svg viewBox="0 0 80 40"><text x="60" y="20">a long name</text></svg>'),
        ("covered", '<svg viewBox="0 0 80 40"><text y="20">one</text><text x="5" y="20">two</text></svg>'),
    ],
)
def test_what_cannot_be_seen_well_would_be_noticed(browser: Browser, tmp_path: Path, what: str, body: str) -> None:
    opened(browser, tmp_path / "a.html", body)
    assert browser.run(AUDIT)[what] != []


def test_a_browser_is_named_by_the_environment_or_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DDKIT_BROWSER", raising=False)
    assert find_browser() is None
    for name in ("chromium", "mine"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert find_browser() == str(tmp_path / "chromium")
    monkeypatch.setenv("DDKIT_BROWSER", "mine")
    assert find_browser() == str(tmp_path / "mine")
    monkeypatch.setenv("DDKIT_BROWSER", "nothing-like-it")
    assert find_browser() is None
