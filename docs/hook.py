"""The pages as a site: what MkDocs has to be told of a repository whose pages are written for its readers there.

Pages link to each other, to pictures, figures and code by relative names that work in the repository. The site's
start page is README.md; every page that lies outside docs/ is one of the site, too, and pictures and figures that pages
show are taken along, so that nothing is fetched from elsewhere to look at it. What remains, code and folders, lies at
`extra.repository` of mkdocs.yml where somebody says which that is (REPOSITORY_URL), and is a word without a link
where nobody does. Headings have the anchors that they have in a repository. The tests ask the same functions.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
PLACE = {"README.md": "index.md"}  # in the repository → in the site; docs/x.md is x.md, all else stays where it is
TAKEN = (".png", ".jpg", ".svg", ".json")  # pictures and figures that go along
IGNORED = {"build", "dist", "runs", "site", "node_modules"}  # folders that are made

FENCE = re.compile(r"^(?P<fence> *(?:`{3,}|~{3,})).*?(?:^\s*(?P=fence)\s*$|\Z)", re.S | re.M)
CODE = re.compile(r"(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)
LINK = re.compile(
    r"""\]\(\s*<?(?P<inline>[^)\s<>]+)>?(?:\s+"[^"]*")?\s*\)"""  # [words](target) and pictures
    r"""|^\s{0,3}\[[^\]]+\]:\s+<?(?P<reference>\S+?)>?(?:\s|$)"""  # [words]: target
    r"""|<(?:a|img|source)\s[^>]*?(?:href|src)=["'](?P<tag>[^"']+)""",
    re.M,
)
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.+?)(?:\s+#+)?\s*$", re.M)
ANCHOR = re.compile(r"""<a\s[^>]*?(?:id|name)=["']([^"']+)""")


def without_code(text: str, spans: bool = True) -> str:
    """The same text, as long, with blanks where code and comments stand."""

    def blank(found: re.Match) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    for pattern in (FENCE, COMMENT, CODE) if spans else (FENCE, COMMENT):
        text = pattern.sub(blank, text)
    return text


def links(text: str) -> Iterator[tuple[int, int, str]]:
    """Where in a page a link's target begins and ends, and the target."""
    for found in LINK.finditer(without_code(text)):
        name = found.lastgroup
        yield found.start(name), found.end(name), found[name]


def outside(target: str) -> bool:
    """An address of its own, mail and the like: nothing of this repository."""
    return bool(re.match(r"[a-zA-Z][\w+.-]*:|//", target))


def slug(heading: str, separator: str = "-") -> str:
    """A heading's anchor in a repository: small letters, digits, `_` and `-`, one separator for every blank."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def anchors(text: str) -> list[str]:
    """All anchors of a page; a heading that stands there again is counted."""
    found: list[str] = []
    for heading in HEADING.findall(without_code(text, spans=False)):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = slug(re.sub(r"(?<!\w)[*_]+|[*_]+(?!\w)|`", "", words))
        again = sum(name == other or re.fullmatch(rf"{re.escape(name)}-\d+", other) is not None for other in found)
        found.append(f"{name}-{again}" if again else name)
    return found + ANCHOR.findall(without_code(text))


def pages(root: Path = ROOT) -> list[str]:
    """All Markdown of the repository, by name."""
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = [d for d in inner if d not in IGNORED and not d.startswith(".") and not d.endswith(".egg-info")]
        inner[:] = [d for d in inner if not Path(folder, d, "pyvenv.cfg").exists()]
        if Path(folder) == root / "playground":
            inner[:] = [d for d in inner if d != "data"]
        found += [Path(folder, f).relative_to(root).as_posix() for f in files if f.endswith(".md")]
    return sorted(found)


def resolve(page: str, target: str) -> tuple[str, str]:
    """What a relative link of a page means: a name in the repository, and an anchor or nothing."""
    path, _, anchor = target.partition("#")
    if not path:
        return page, unquote(anchor)
    return os.path.normpath(os.path.join(os.path.dirname(page), unquote(path))).replace(os.sep, "/"), unquote(anchor)


def fault(page: str, target: str, root: Path = ROOT) -> str | None:
    """What is wrong with a link of a page, or None."""
    if outside(target):
        good = re.fullmatch(r"https?://[a-z0-9][a-z0-9.-]*\.[a-z]{2,}(:\d+)?([/?#][^\s<>\"`{}|\\^]*)?", target, re.I)
        return None if good or target.startswith("mailto:") else f"{page}: {target} is no address"
    if target.startswith("/"):
        return f"{page}: {target} begins at the root of a machine or a server; write it relative to the page"
    name, anchor = resolve(page, target)
    if name.startswith(".."):
        return f"{page}: {target} leads out of the repository"
    if not (root / name).exists():
        return f"{page}: {target} is not there"
    if not anchor:
        return None
    if not name.endswith(".md"):
        return f"{page}: {target} has an anchor, and {name} is no page"
    return None if anchor in anchors((root / name).read_text("utf-8")) else f"{page}: {name} has no heading #{anchor}"


def place(name: str) -> str:
    """Where a page, picture or file of figures of the repository lies in the site."""
    return PLACE.get(name) or name.removeprefix("docs/")


def home(name: str) -> str:
    """And back: what the site's page is in the repository."""
    back = {there: here for here, there in PLACE.items()}
    if name in back:
        return back[name]
    return f"docs/{name}" if (ROOT / "docs" / name).is_file() else name


def in_site(page: str, target: str, repository: str) -> str | None:
    """The target of a link as the site's page has it; None where it has none there."""
    if outside(target) or target.startswith("#"):
        return target
    name, anchor = resolve(page, target)
    tail = f"#{anchor}" if anchor else ""
    if name.endswith(".md") or Path(name).suffix in TAKEN:
        return os.path.relpath(place(name), os.path.dirname(place(page)) or ".").replace(os.sep, "/") + tail
    kind = "tree" if (ROOT / name).is_dir() else "blob"
    return f"{repository.rstrip('/')}/{kind}/HEAD/{name}{tail}" if repository else None


def rewritten(page: str, text: str, repository: str = "") -> str:
    """A page of the repository as a page of the site."""
    for start, end, target in reversed(list(links(text))):
        there = in_site(page, target, repository)
        if there is not None:
            text = text[:start] + there + text[end:]
        else:  # the words alone
            before, after = text[:start].rsplit("[", 1), text[end:].split(")", 1)
            text = before[0] + before[1].rsplit("](", 1)[0] + after[1]
    return text


def reached(begin: Iterable[str], root: Path = ROOT) -> list[str]:
    """These pages and all pages, pictures and files of figures that they lead to, by name in the repository."""
    todo, found = list(begin), []
    while todo:
        name = todo.pop()
        if name in found or not (root / name).is_file() or not name.endswith((".md", *TAKEN)):
            continue
        found.append(name)
        if name.endswith(".md"):
            targets = (target for *_, target in links((root / name).read_text("utf-8")))
            todo += [resolve(name, target)[0] for target in targets if not outside(target)]
    return sorted(found)


# ---------------------------------------------------------------------- what MkDocs calls


def on_config(config):
    """Anchors as in a repository."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files, config):
    """The pages outside docs/ that the table of contents or another page names, and the pictures and figures of all."""
    from mkdocs.structure.files import File

    named = [home(name) for name in re.findall(r"[\w./-]+\.md", str(config.nav))]
    for name in reached([*named, *(home(file.src_uri) for file in files.documentation_pages())]):
        if files.get_file_from_path(place(name)) is None:
            files.append(File.generated(config, place(name), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as the site has them; what is wrong with one ends a strict build."""
    name = home(page.file.src_uri)
    for *_, target in links(markdown):
        if wrong := fault(name, target):
            logging.getLogger("mkdocs.hooks.links").warning(wrong)
    return rewritten(name, markdown, config.extra.get("repository") or "")
