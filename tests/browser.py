"""A headless Chromium for tests, driven by the DevTools protocol over two pipes; where to find one; what a page holds."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

NAMES = (
    "chromium-headless-shell",
    "chrome-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--mute-audio",
    "--force-color-profile=srgb", "--remote-debugging-pipe",
)  # fmt: skip
SECONDS = 30.0  # that any answer may take
# Chromium reads orders at descriptor 3 and answers at 4; a process of its own moves them there, as fork with threads is not safe.
START = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


def find_browser() -> str | None:
    """Returns the path of a Chromium or Chrome: $DDKIT_BROWSER, else the first that is installed, None where there is none."""
    named = os.environ.get("DDKIT_BROWSER")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


class Seen(NamedTuple):
    """What happened while a page was open: `messages` of its console, `requests` for anything but the page itself and data in it."""

    messages: list[str]
    requests: list[str]


class Browser:
    """One headless browser with one page. Everything is written into the new folder `profile`."""

    def __init__(self, path: str, profile: Path) -> None:
        ours, theirs = _pipe(), _pipe()
        command = [sys.executable, "-c", START, str(ours[0]), str(theirs[1]), path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._log = (profile.parent / f"{profile.name}.log").open("wb")
        self._process = subprocess.Popen(command, pass_fds=(ours[0], theirs[1]), stdout=self._log, stderr=self._log)
        os.close(ours[0])
        os.close(theirs[1])
        self._write, self._read = ours[1], theirs[0]
        self._buffer, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setScrollbarsHidden", hidden=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait(SECONDS)
        os.close(self._write)
        os.close(self._read)
        self._log.close()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Returns the answer to an order of the DevTools protocol."""
        self._number += 1
        order = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        os.write(self._write, json.dumps(order).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self._events.append(message)

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._read, 2**20) if ready else b""
            assert data, f"the browser says nothing for {SECONDS} seconds, or ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def show(self, width: int, scheme: str, height: int = 900) -> None:
        """Makes the page `width` CSS pixels wide, in the colour scheme "light" or "dark"."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, file: Path) -> Seen:
        """Opens a file, waits for it and its images, and returns what happened."""
        self._events.clear()
        address = file.resolve().as_uri()
        self.ask("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next())
        self.run("Promise.allSettled([...document.images].map(image => image.decode())).then(() => 0)")
        messages, requests = [], []
        for event in self._events:
            method, what = event["method"], event.get("params", {})
            if method == "Log.entryAdded":
                messages.append(f"{what['entry']['level']}: {what['entry']['text']}")
            elif method == "Runtime.consoleAPICalled":
                messages.append(f"{what['type']}: {[argument.get('value') for argument in what['args']]}")
            elif method == "Runtime.exceptionThrown":
                messages.append(f"exception: {what['exceptionDetails']['text']}")
            elif method == "Network.requestWillBeSent":
                requests.append(what["request"]["url"])
        return Seen(messages, [url for url in requests if url != address and not url.startswith("data:")])

    def run(self, script: str) -> Any:
        """Returns the value of a JavaScript expression; waits where it is a promise."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, file: Path) -> None:
        """Writes a PNG of the whole page."""
        answer = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))


def _pipe() -> tuple[int, int]:
    """Returns the ends of a pipe, to read and to write, away from the descriptors that Chromium uses."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]


# What can be seen of the page: an object of lists, each of which names what is wrong there.
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
    for (const mark of svg.querySelectorAll('polyline, rect, circle')) {
      const style = getComputedStyle(mark), colour = style.fill === 'none' ? style.stroke : style.fill;
      if (ratio(channels(colour), ground) < 3) found.faint.push(`${mark.tagName}: ${colour}`);
    }
  }
  return found;
})()"""
