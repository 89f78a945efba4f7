"""Pages: their tags, and what a headless browser draws of them, where there is one."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
with_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser here: none of {', '.join(BROWSERS)}"
)


def browse(path: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page, with a profile in a folder."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1200,3600",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        *options,
        path.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)


def pixels(path: Path) -> bytes:
    """The data of an 8-bit PNG, with its line filters still applied."""
    data, at, packed = path.read_bytes(), 8, b""
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        packed += data[at + 8 : at + 8 + length] if data[at + 4 : at + 8] == b"IDAT" else b""
        at += length + 12
    return zlib.decompress(packed)


class PageChecker(HTMLParser):
    """Checks that tags are closed in order, and that nothing points outside the page."""

    VOID = ("meta", "link", "rect", "path", "circle", "line", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.targets: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert not {"src", "onclick", "onload"} & given.keys()
        self.ids.add(given.get("id") or "")
        href = given.get("href") or ""
        assert href == "" or href.startswith("#") or href == "data:,"
        self.targets |= {href[1:]} if href.startswith("#") else set()
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
