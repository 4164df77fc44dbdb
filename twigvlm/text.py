"""Text that every encoding can hold. Standard library only."""

from __future__ import annotations


def whole(text: str) -> str:
    """The text with U+FFFD for half a character (a lone surrogate, which JSON can write and no encoding can)."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
