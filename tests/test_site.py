"""The pages as a site, where MkDocs is installed (the extra `docs`; .ci/run asks these in an environment of their own)."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs the extra docs: docs/requirements.txt"),
]
FETCHED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "link": "href",
    "video": "src",
    "embed": "src",
}


def build(root: Path, site: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "HOME": str(site.parent), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("built") / "site"
    out = build(ROOT, place, REPOSITORY_URL="https://host.org/us/it")
    assert out.returncode == 0, out.stderr
    return place


class Page(HTMLParser):
    """What a page fetches when it is looked at, where it leads, and its anchors."""

    def __init__(self, file: Path):
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.anchors.add(found["id"])
        if tag in FETCHED and found.get(FETCHED[tag]) and found.get("rel") != "canonical":
            self.fetched.append(found[FETCHED[tag]])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])


def test_looking_at_it_fetches_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for file in pages:
        for address in Page(file).fetched:
            assert not urlsplit(address).netloc, f"{file.name}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import", style.read_text("utf-8")), style.name


def test_everything_that_a_page_shows_or_leads_to_is_in_it(site):
    pages = {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}
    for file, page in pages.items():
        for address in page.fetched + page.links:
            parts = urlsplit(address)
            if parts.scheme or not parts.path + parts.fragment:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert target.exists(), f"{file.relative_to(site)}: {address}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors | {"__skip"}, f"{file.name}: {address}"


def test_the_readme_is_the_first_page_and_the_docstrings_are_there(site):
    first, face = ((site / name).read_text("utf-8") for name in ("index.html", "api.html"))
    assert "assets/kept.png" in first and 'href="results.html#llava-15-7b-memory-and-time"' in first
    assert "https://host.org/us/it/blob/HEAD/examples/twigvlm.ipynb" in first
    for name in ("twigvlm.load", "twigvlm.vlm.TwigVLM.generate", "twigvlm.vlm.Stats"):
        assert f'id="{name}"' in face, name
    assert (site / "search" / "search_index.js").is_file()


WRONG = {  # page: a link that leads nowhere, and what is said of it
    "README.md": ("[x](docs/nothing.md)", "docs/nothing.md is not there"),
    "docs/results.md": ("[x](../twigvlm/nothing.py)", "nothing.py is not there"),
}


def test_wrong_links_end_the_build(tmp_path):
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "assets", "twigvlm", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("benchmarks", "checkpoints", "playground"):
        (tmp_path / name).symlink_to(ROOT / name)
    for page, (link, _) in WRONG.items():
        with open(tmp_path / page, "a", encoding="utf-8") as file:
            file.write(f"\n{link}\n")
    out = build(tmp_path, tmp_path / "site")
    assert out.returncode != 0 and all(words in out.stderr + out.stdout for _, words in WRONG.values()), out.stderr
