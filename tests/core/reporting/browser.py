"""Opens a page in headless Chromium, which Debian packages; nothing is downloaded by tests."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

INSTALL = "apt-get install -y chromium"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    # Whatever a page asks for, no name leads anywhere.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
PROBE = """
<script>
// A window's load event waits for its frames and their pictures, and the browser hands the
// document over after it: nothing here may be asynchronous, or the document leaves without it.
onload = () => {
  const inner = document.querySelector("iframe").contentDocument;
  const root = inner.documentElement;
  const found = {
    pictures: [...inner.images].map(one => [one.alt, one.complete ? one.naturalWidth : 0]),
    sections: [...inner.querySelectorAll("main > section")].map(
      one => [one.id, one.querySelector("h2").textContent, one.getBoundingClientRect().height]),
    headings: [...inner.querySelectorAll("h1, h2, h3, h4")].map(one => +one.tagName[1]),
    bars: [...inner.querySelectorAll("svg.bar > rect.track + rect")].map(
      one => one.getBoundingClientRect().width),
    page_width: root.scrollWidth,
    shown_width: root.clientWidth,
    background: getComputedStyle(inner.body).backgroundColor,
    requests: inner.defaultView.performance.getEntriesByType("resource")
      .map(one => one.name).filter(one => !one.startsWith("data:")),
  };
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
};
</script>
"""


def chromium() -> str:
    """The browser's path. Absent, the test is skipped; in CI it fails."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have Chromium: {INSTALL}")
    pytest.skip(f"no Chromium here: {INSTALL}")


def dump_dom(page: Path, folder: Path, *more: str) -> str:
    """The document as the browser holds it after loading."""
    return _run(page, folder, "--dump-dom", *more)


def screenshot(page: Path, folder: Path, *more: str) -> Path:
    """A PNG of the page's top, 1200 × 900 pixels."""
    picture = folder / f"{page.stem}.png"
    _run(page, folder, f"--screenshot={picture}", "--window-size=1200,900", *more)
    return picture


def probe(text: str, width: int, folder: Path, *more: str) -> dict[str, Any]:
    """What the browser finds in the page, shown `width` pixels wide.

    The page is put in a frame, since a window cannot be as narrow as a phone, and a script beside
    it looks inside. Its own policy forbids scripts, so the copy goes without it.
    """
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    frame = f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(copy)}">'
    outer = folder / f"probe-{width}.html"
    outer.write_text(f"<!doctype html><body>{frame}</iframe>{PROBE}</body>", encoding="utf-8")
    dom = dump_dom(outer, folder, "--window-size=1400,900", *more)
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-500:]
    document: dict[str, Any] = json.loads(html.unescape(found[1]))
    return document


def _run(page: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments, page.as_uri()],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
