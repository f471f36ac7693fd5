"""A headless Chromium for tests of pages: what the page holds, what it asks for, how it looks.

Debian and Ubuntu: ``apt-get install chromium``. Without it the tests that need it are skipped, and
fail where the environment variable ``CI`` is set.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
)


def find_browser():
    """Return the browser's path; skip the test without one, or fail it under CI."""
    for name in _NAMES:
        found = shutil.which(name)
        if found:
            return found
    message = f"no browser ({', '.join(_NAMES)}) on the path; apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def _run(browser, *words, seconds=60):
    with tempfile.TemporaryDirectory() as profile:
        return subprocess.run(
            [browser, *_FLAGS, f"--user-data-dir={profile}", *words],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=True,
        ).stdout


_PROBE = """
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  const root = page.documentElement, width = root.clientWidth;
  const scrolls = (node) => node && node !== page.body &&
    (["auto", "scroll", "hidden"].includes(getComputedStyle(node).overflowX) ||
      scrolls(node.parentElement));
  const wide = [...page.body.querySelectorAll("*")].filter((node) =>
    node.getBoundingClientRect().right > width + 1 && !scrolls(node));
  const found = {
    width, scroll_width: root.scrollWidth, height: root.scrollHeight,
    images: [...page.images].map((image) => [image.alt, image.complete ? image.naturalWidth : 0]),
    resources: page.defaultView.performance.getEntriesByType("resource").map((r) => r.name),
    wide: wide.map((node) => node.outerHTML.slice(0, 120)),
    text: page.body.innerText.length,
  };
  document.title = "measured";
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


def _framed(page, width, height, script=""):
    frame = f'<iframe srcdoc="{escape(page.read_text(encoding="utf-8"))}" '
    frame += f'style="width:{width}px;height:{height}px;border:0;display:block"></iframe>'
    script = f"<script>{script}</script>" if script else ""
    return f"<!DOCTYPE html><html><head>{script}</head><body style='margin:0'>{frame}</body></html>"


def measure(page, width, directory):
    """Return what a browser ``width`` pixels wide makes of the page.

    Returns
    -------
    dict
        ``width``, ``scroll_width`` and ``height`` in pixels; ``images`` as (alt, natural width, 0
        when broken); ``resources`` that were asked for beyond the page itself; ``wide`` elements
        that stick out and are in no scrolling box; ``text``, the number of characters.
    """
    wrapper = Path(directory) / f"probe_{width}.html"
    wrapper.write_text(_framed(page, width, 900, _PROBE), encoding="utf-8")
    dom = _run(find_browser(), "--virtual-time-budget=20000", "--dump-dom", wrapper.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found, f"the page did not load: {dom[:500]}"
    return json.loads(unescape(found[1]))


def screenshot(page, width, height, png, *, dark=False):
    """Save the page as a browser ``width`` pixels wide shows it; return the pixels, (h, w, 3)."""
    wrapper = Path(png).with_suffix(".html")
    wrapper.write_text(_framed(page, width, height), encoding="utf-8")
    _run(
        find_browser(),
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        f"--screenshot={png}",
        f"--window-size={max(width, 600)},{height}",
        wrapper.as_uri(),
    )
    with Image.open(png) as image:
        cropped = image.convert("RGB").crop((0, 0, width, height))
    cropped.save(png)
    return np.asarray(cropped)


def look_at(address, png, *, width, height):
    """Save what a browser shows at an address of this machine; return the document it made."""
    browser = find_browser()
    flags = ["--virtual-time-budget=9000", f"--window-size={width},{height}"]
    _run(browser, *flags, f"--screenshot={png}", address)
    return _run(browser, *flags, "--dump-dom", address)


def picture_of(png):
    """Return the pixels of a picture, (h, w, 3)."""
    with Image.open(png) as image:
        return np.asarray(image.convert("RGB"))
