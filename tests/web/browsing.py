"""A real browser, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

# No graphics card, no sandbox (a container has none), and nothing that asks the network by itself.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """Chromium without a head, driven by playwright."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium on this machine")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


class Watched:
    """A page whose console and requests are noted."""

    def __init__(self, context, place: str):
        self.page, self.place = context.new_page(), place
        self.console: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda fault: self.console.append(f"pageerror: {fault}"))
        self.page.on("request", self._note)

    def _note(self, request) -> None:
        if not request.url.startswith((f"http://{self.place}/", "blob:", "data:")):
            self.foreign.append(request.url)

    def open(self, link: str = ""):
        self.page.goto(f"http://{self.place}/{link}")
        self.page.wait_for_selector("html[data-ready]")
        return self.page


@pytest.fixture
def visit(chromium) -> Iterator:
    """visit(place, link, …): a page of its own; afterwards nothing foreign was asked and the console is silent."""
    opened, contexts = [], []

    def go(place: str, link: str = "", quiet: bool = True, **settings):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        context.set_default_timeout(20_000)
        contexts.append(context)
        watched = Watched(context, place)
        opened.append((watched, quiet))
        return watched.open(link)

    yield go
    try:
        for watched, quiet in opened:
            assert not watched.foreign
            assert not (quiet and watched.console), watched.console
    finally:
        for context in contexts:
            context.close()
