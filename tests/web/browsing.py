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


SIZE = {"width": 1280, "height": 900}
LOOK = {"color_scheme": "light", "reduced_motion": "no-preference"}


class Tab:
    """A page whose console and requests are noted."""

    def __init__(self, browser):
        self.context = browser.new_context()
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.place, self.quiet = "", True
        self.console: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda fault: self.console.append(f"pageerror: {fault}"))
        self.page.on("request", self._note)

    def _note(self, request) -> None:
        if not request.url.startswith((f"http://{self.place}/", "blob:", "data:")):
            self.foreign.append(request.url)

    def open(self, place: str, link: str, quiet: bool, **look: str):
        """As somebody sees it who has never been there."""
        self.page.set_viewport_size(SIZE)
        self.page.emulate_media(**LOOK | look)
        self.page.mouse.move(0, 0)
        self.place, self.quiet = place, quiet
        self.console.clear()
        self.foreign.clear()
        self.page.goto(f"http://{place}/{link}")
        self.page.wait_for_selector("html[data-ready]")
        return self.page

    def leave(self) -> None:
        """Nothing foreign was asked and the console is silent; nothing is remembered, and the same link loads anew."""
        foreign, console = [*self.foreign], [*self.console]  # the page may go on asking a server that has ended by now
        self.page.evaluate("localStorage.clear()")
        self.page.goto("about:blank")
        assert not foreign
        assert not (self.quiet and console), console


@pytest.fixture(scope="session")
def tab(chromium) -> Tab:
    """One for all tests: a new one is a process, which takes twice as long to start as a page is at work in a test."""
    return Tab(chromium)


@pytest.fixture
def visit(chromium, tab) -> Iterator:
    """visit(place, link, …): the page anew, in `beside` one more tab; what it must not do is looked for afterwards."""
    used: list[Tab] = []

    def go(place: str, link: str = "", quiet: bool = True, beside: bool = False, **look: str):
        one = Tab(chromium) if beside else tab
        if one in used:
            one.leave()
        else:
            used.append(one)
        return one.open(place, link, quiet, **look)

    yield go
    try:
        for one in used:
            one.leave()
    finally:
        for one in used:
            if one is not tab:
                one.context.close()
