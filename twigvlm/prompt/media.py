"""Which fields of a record name what is to be looked at: two are read, any other that looks like one is refused, not passed over."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

PICTURES = ("image", "images")  # the fields that are read
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)  # how the address of what is no file begins
SHOWN = 80  # letters of a value in a message
_PICTURE = r"(?:image|img|pic|picture|photo|gif)"
_OTHER = r"(?:video|audio|frame|media)"
_HOW = r"s?([_-]?(?:path|file|filename|file_name|name|url|uri|data|bytes|base64|list)s?)?[_-]?\d*"
_FIELD = re.compile(f"({_PICTURE}|{_OTHER}){_HOW}", re.IGNORECASE)
_MARK = re.compile(r"^[ \t]*<(?:image|video|audio)>|<(?:image|video|audio)>[ \t]*$", re.MULTILINE)


def unread(record: Mapping[str, Any], known: Collection[str] = PICTURES) -> tuple[str, str] | None:
    """The first field that names pictures, videos or sounds and is not `known`, and what is wrong with it.

    Where a known field names a picture, image_url and the like say where else it is to be had.
    """
    named = any(record.get(key) for key in known)
    for key, value in record.items():
        if key in known or not value or not (found := _FIELD.fullmatch(key)):
            continue
        picture = re.fullmatch(_PICTURE, found[1], re.IGNORECASE)
        if picture and named and found[2] and not key[-1].isdigit():
            continue
        why = 'name pictures under "image" or "images", of the record' if picture else "only pictures can be looked at"
        return key, f'"{key}" is {str(value)[:SHOWN]!r}; {why}'
    return None


def mark(text: str) -> str | None:
    """The first `<image>`, `<video>` or `<audio>` that begins or ends a line, as marks do; within a sentence it is a word."""
    found = _MARK.search(text)
    return found and found[0].strip()
