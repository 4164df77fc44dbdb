"""What a chat template makes of a question, in the two forms that a message's content has: a list of parts, or a text."""

from __future__ import annotations

from collections.abc import Callable

from ...config import IMAGE

WORD = (
    "twig\\probe"  # printed as Python or JSON its backslash is doubled: a content that is shown is not one that is said
)


def heard(render: Callable[[list[dict]], str], pictures: int) -> dict[bool, str]:
    """Whether in parts → the prompt that asks WORD about so many pictures; a form in which the template raises is not there."""
    parts = [{"type": "image"}] * pictures + [{"type": "text", "text": WORD}]
    found = {}
    for in_parts, content in ((True, parts), (False, f"{IMAGE}\n" * pictures + WORD)):
        try:
            found[in_parts] = render([{"role": "user", "content": content}])
        except Exception:  # a template is a program; which conversations it takes is its own affair
            continue
    return found


def says(prompt: str) -> bool:
    """Whether the question is in it as it was asked."""
    return prompt.count(WORD) == 1
