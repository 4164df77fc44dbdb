"""The page as README shows it: `python -m tests.web.screenshot` writes assets/web.png (needs playwright and chromium).

The embedded model describes its sample picture by four methods, in real Chromium.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from .browsing import FLAGS

ROOT = Path(__file__).resolve().parents[2]
LINK = "#m=-unpruned&m=twig&m=twig-discount&m=fastv&R=64"


def photograph(page: Page, place: str, runs: int, out: Path) -> None:
    page.goto(f"{place}{LINK}")
    page.wait_for_selector("html[data-ready]")
    for _ in range(runs):
        page.click("#run")
        page.wait_for_selector("#results[data-state=done]", timeout=600_000)
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(out, optimize=True)


@contextmanager
def server() -> Iterator[str]:
    """The page's program over the embedded model."""
    words = [sys.executable, "-m", "twigvlm.web", "--port", "0", "--device", "cpu"]
    started = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield re.match(r"\S+", started.stdout.readline())[0]
    finally:
        started.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "web.png")
    parser.add_argument("--address", metavar="URL", help="of a page that is served already")
    parser.add_argument("--runs", type=int, default=2, help="the first one of a process is slower (default 2)")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1440)
    parser.add_argument("--height", type=int, default=1150)
    args = parser.parse_args()
    colours = "dark" if args.dark else "light"
    with nullcontext(args.address) if args.address else server() as place, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": args.width, "height": args.height}, color_scheme=colours)
        photograph(page, place, args.runs, args.out)
        browser.close()
    print(f"picture: {args.out}, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
