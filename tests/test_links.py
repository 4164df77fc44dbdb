"""Every link of every page leads somewhere: files, headings, addresses by their form. Without MkDocs, which has its own say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_hook():
    described = importlib.util.spec_from_file_location("pages_hook", ROOT / "docs" / "hook.py")
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


hook = load_hook()


def test_links_of_all_pages():
    texts = {page: (ROOT / page).read_text("utf-8") for page in hook.pages()}
    assert {"README.md", "CONTRIBUTING.md", "docs/results.md", "playground/README.md"} <= set(texts)
    found = [(page, target) for page, text in texts.items() for *_, target in hook.links(text)]
    assert not [wrong for page, target in found if (wrong := hook.fault(page, target))]
    assert len(found) > 70


def test_links_of_the_notebook():
    (notebook,) = ROOT.glob("examples/*.ipynb")
    targets = re.findall(r"\]\(([^)\s]+)\)", notebook.read_text("utf-8"))
    page = notebook.relative_to(ROOT).as_posix()
    assert targets and not [wrong for target in targets if (wrong := hook.fault(page, target))]


def test_every_page_stands_in_the_table_of_contents():
    named = re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:")[1])
    assert {hook.home(name) for name in named} >= {page for page in hook.pages() if page.startswith("docs/")}
    assert all((ROOT / hook.home(name)).is_file() for name in named)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# One\n## A b\n## A b\n```text\n# no\n```\n", "utf-8")
    (tmp_path / "code.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("page.md", None),
        ("page.md#a-b-1", None),
        ("#one", None),
        ("../code.py", None),
        ("..", None),
        ("https://arxiv.org/abs/2503.14075", None),
        ("page.md#no", "no heading #no"),
        ("#a-b-2", "no heading"),
        ("pages.md", "not there"),
        ("../code.py#L3", "no page"),
        ("../../x.md", "out of the repository"),
        ("/docs/page.md", "begins at the root"),
        ("https://nowhere", "no address"),
        ("http:/arxiv.org", "no address"),
        ("ftp://a.org/b", "no address"),
    ],
)
def test_what_is_wrong_with_a_link(place, target, words):
    found = hook.fault("docs/page.md", target, place)
    assert found is None if words is None else words in found and found.startswith("docs/page.md: ")


def test_links_are_found_where_they_are_links():
    text = (
        "[a](x.md) ![b](y.png \"title\") `[c](no.md)` <img src='z.svg'>\n"
        "```\n[d](no.md)\n```\n<!-- [e](no.md) -->\n[f]: w.md\n[![g](in.png)](out.md)\n~~~~\n[h](no.md)\n"
    )
    assert [target for *_, target in hook.links(text)] == ["x.md", "y.png", "z.svg", "w.md", "in.png", "out.md"]
    assert all(text[a:b] == target for a, b, target in hook.links(text))


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("LLaVA-1.5-7B: memory and time", "llava-15-7b-memory-and-time"),
        ("`twig_config.json` and [a link](x.md)", "twig_configjson-and-a-link"),
        ("A base, trained (2026-11-26)", "a-base-trained-2026-11-26"),
        ("Wörter - *drei* & mehr", "wörter---drei--mehr"),
    ],
)
def test_anchors_are_those_of_a_repository(heading, anchor):
    assert hook.anchors(f"## {heading}\n") == [anchor]


def test_pages_are_rewritten_for_the_site():
    text = "[a](docs/results.md#x) ![b](assets/kept.png) [c](twigvlm/vlm.py) [d](twigvlm) [e](https://a.org) [f](#g)"
    site = hook.rewritten("README.md", text, "https://host.org/us/it")
    assert site == (
        "[a](results.md#x) ![b](assets/kept.png) [c](https://host.org/us/it/blob/HEAD/twigvlm/vlm.py) "
        "[d](https://host.org/us/it/tree/HEAD/twigvlm) [e](https://a.org) [f](#g)"
    )
    assert hook.rewritten(
        "docs/LOG.md", "see [the code](../twigvlm/vlm.py), [b](../README.md#start) [c](../CHANGELOG.md)"
    ) == ("see the code, [b](index.md#start) [c](CHANGELOG.md)")
    assert hook.rewritten("playground/README.md", "[a](../docs/results.md) [b](../README.md)") == (
        "[a](../results.md) [b](../index.md)"
    )
