"""Which fields of a record name what is to be looked at: two are read, any other that looks like one is refused, not passed over."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

PICTURES = ("image", "images")  # the fields that are read
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)  # how the address of what is no file begins
SHOWN, FIELDS = 80, 12  # letters of a value, and names of fields, in a message
_PICTURE = r"(?:image|img|pic|picture|photo|gif)"
_OTHER = r"(?:video|audio|frame|media)"
_HOW = r"s?([_-]?(?:path|file|filename|file_name|name|url|uri|src|data|bytes|base64|list)s?)?[_-]?\d*"
_FIELD = re.compile(f"({_PICTURE}|{_OTHER}){_HOW}", re.IGNORECASE)
_OUTRIGHT = re.compile(r"(?:image|img|picture|video|audio)s?\d*", re.IGNORECASE)  # whatever the value is called
_PERHAPS = re.compile(r"image_?id|file_?name|src", re.IGNORECASE)  # a picture only if its value is the name of one
_FILE = re.compile(r".*\.\d?[a-z][a-z0-9]{1,4}", re.IGNORECASE)
_PICTURE_FILE = re.compile(r".*\.(?:jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)
_BASE64 = re.compile(r"[\w+/=-]{100,}", re.ASCII)
_NAME = r"<(image(?:[_ -]?\d+)?|video|audio)>"
_MARK = re.compile(rf"\A\s*{_NAME}|{_NAME}\s*\Z", re.IGNORECASE)


def unread(record: Mapping[str, Any], known: Collection[str] = PICTURES) -> tuple[str, str] | None:
    """The first field that names pictures, videos or sounds and is not `known`, and what is wrong with it.

    Where a known field names a picture, image_url and the like say where else it is to be had. Numbers, and plain words
    in any but the plainest fields, name nothing: "frames": 8, "media": "web".
    """
    named = names_pictures(record, known)
    for key, value in record.items():
        if key in known or not value:
            continue
        found = _FIELD.fullmatch(key)
        if found:
            picture = re.fullmatch(_PICTURE, found[1], re.IGNORECASE)
            counts = str.strip if _OUTRIGHT.fullmatch(key) else _names_file
            beside = picture and found[2] and not key[-1].isdigit()
        else:
            picture, counts, beside = _PERHAPS.fullmatch(key), _names_picture, True
        if not (found or picture) or (named and beside) or not any(map(counts, _texts(value))):
            continue
        why = 'name pictures under "image" or "images", of the record' if picture else "only pictures can be looked at"
        return key, f'"{key}" is {str(value)[:SHOWN]!r}; {why}'
    return None


def names_pictures(record: Mapping[str, Any], known: Collection[str] = PICTURES) -> bool:
    return any(record.get(key) for key in known)


def fields_of(records: Iterable[Any]) -> str:
    """The fields that records have, for a message."""
    found = {key: None for record in records if isinstance(record, Mapping) for key in record}
    return ", ".join([*found][:FIELDS]) + (", …" if len(found) > FIELDS else "")


def marks(text: str) -> list[str]:
    """Each `<image>`, `<image_1>`, `<video>` or `<audio>`, in any case, that begins or ends a question, as marks do.

    Within it they are words, and so is one that a closing tag answers: that is HTML or RSS.
    """
    if "<" not in text:
        return []
    found = [(match[0].strip(), match[1] or match[2]) for match in _MARK.finditer(text)]
    return [mark for mark, name in found if f"</{name}>".lower() not in text.lower()]


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, however deep."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, (list, dict)):
            left += one.values() if isinstance(one, dict) else one


def _names_file(text: str) -> bool:
    return bool(ADDRESS.match(text) or _FILE.fullmatch(text.strip()) or _BASE64.match(text))


def _names_picture(text: str) -> bool:
    return bool(_PICTURE_FILE.fullmatch(text.strip()))
