"""A record of LLaVA's instruction files as turns and pictures, before any tokenizer; what makes one unusable.

An unusable record is an answer (`Skipped`), not an exception: nothing is passed over silently.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...files import Doubled
from ...prompt.media import ADDRESS, PICTURES, SHOWN, marks, unread
from ...prompt.template import HUMAN, IMAGE, MODEL, VICUNA_V1

NO_LABELS, MALFORMED = "labels cannot be aligned", "malformed record"
IMAGE_COUNT, IMAGE_ELSEWHERE = "image count", "image is no file"
MEDIA_UNNAMED, SYSTEM = "media not named", "system text"


@dataclass(frozen=True)
class Skipped:
    """A record that cannot be used: a reason to count by, and what exactly is wrong."""

    reason: str
    detail: str
    index: int | None = None  # place in the file, from 0
    id: object = None


class _Unusable(Exception):
    """(reason, detail)."""


@dataclass(frozen=True)
class Conversation:
    """What a record says, before any tokenizer: messages of (human or gpt, text), pictures in the order of their marks."""

    messages: list[tuple[str, str]]
    images: tuple[str, ...]
    marked: bool  # `<image>` is a picture, not a word
    unshown: int = 0  # pictures that no `<image>` shows
    system: str | None = None  # in place of the template's own


def read(record: object) -> Conversation | Skipped:
    """A record's turns and pictures, in the authors' form.

    Every turn that holds `<image>` is stripped and gets it in front, on a line of its own; a first
    turn that is not the human's is dropped with its pictures. One picture stands wherever a turn
    asks for it; several pictures need as many marks, or as many turns with marks. Under the key
    "images" each picture has a mark of its own. A record with neither key has no pictures: within a
    sentence `<image>` is a word there; where it begins or ends a question a picture was meant.
    """
    try:
        return _conversation(record)
    except _Unusable as fault:
        return Skipped(*fault.args)


def _conversation(record: object) -> Conversation:
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        raise _Unusable(MALFORMED, 'an object with a non-empty list "conversations" is expected')
    for i, part in enumerate((record, *turns)):
        if isinstance(part, Doubled):
            raise _Unusable(MALFORMED, f'{f"turn {i - 1}" if i else "the record"} has "{part.key}" twice; keep one')
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise _Unusable(MALFORMED, f'turn {i}: an object with "from" and a text "value" is expected')
        if not _is_text(turn["value"]):
            raise _Unusable(MALFORMED, f"turn {i}: half a character (a lone surrogate) in its text")
        if turn.get("from") not in (HUMAN, MODEL):
            raise _Unusable(
                f"{NO_LABELS}: unknown role", f"turn {i} is from {turn.get('from')!r}; human or gpt is needed"
            )
    marked = any(key in record for key in PICTURES)
    _check_media(record, turns, marked)
    shown, unshown = _pictures(record, [turn["value"].count(IMAGE) for turn in turns])
    messages = [
        (turn["from"], _marks_first(turn["value"], len(names)) if marked else turn["value"])
        for turn, names in zip(turns, shown, strict=True)
    ]
    if messages[0][0] != HUMAN:
        unshown += len(shown[0])
        messages, shown = messages[1:], shown[1:]
    names = tuple(name for names in shown for name in names)
    for name in filter(ADDRESS.match, names):
        raise _Unusable(IMAGE_ELSEWHERE, f"{name[:SHOWN]!r}; fetch it into the image folder and name the file")
    return Conversation(messages, names, marked, unshown, _system(record))


def _check_media(record: dict, turns: list[dict], marked: bool) -> None:
    """Nothing that was to be looked at is passed over."""
    for part, known in ((record, PICTURES), *((turn, ()) for turn in turns)):
        if found := unread(part, known):
            raise _Unusable(*found)
    for i, turn in enumerate(turns):
        if turn["from"] != HUMAN:  # an answer asks for no picture: what it holds is HTML, or RSS
            continue
        for asked in marks(turn["value"]):
            if marked and asked.lower().startswith("<image"):
                continue
            raise _Unusable(MEDIA_UNNAMED, f'turn {i} holds {asked}; name pictures under "image" or "images"')


def _system(record: dict) -> str | None:
    text = record.get("system") or None
    if text is None:
        return None
    if isinstance(text, str) and not _is_text(text):
        raise _Unusable(SYSTEM, 'half a character (a lone surrogate) in "system"')
    if isinstance(text, str) and VICUNA_V1.end not in text and IMAGE not in text:
        return text
    raise _Unusable(SYSTEM, f'"system" is {str(text)[:SHOWN]!r}; a text without {IMAGE} and {VICUNA_V1.end} is needed')


def _is_text(value: str) -> bool:
    """JSON can write what no encoding can."""
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def _marks_first(text: str, marks: int) -> str:
    if IMAGE not in text:
        return text
    return (f"{IMAGE}\n" * marks + text.replace(IMAGE, "").strip()).strip()


def _pictures(record: dict, marks: list[int]) -> tuple[list[list[str]], int]:
    """Names of the pictures shown by each turn, and how many are shown by none."""
    each_marked = bool(record.get("images"))
    if each_marked and record.get("image"):
        raise _Unusable(MALFORMED, 'both "image" and "images" name pictures; one of them is needed')
    names, none = _names(record, "images" if each_marked else "image"), [[] for _ in marks]
    turns = sum(m > 0 for m in marks)
    if not each_marked:
        if not any(key in record for key in PICTURES) or not turns:
            return none, len(names)
        if len(names) == 1:
            return [names * (m > 0) for m in marks], 0
    if len(names) == sum(marks):
        each = marks
    elif len(names) == turns and not each_marked:
        each = [int(m > 0) for m in marks]
    else:
        raise _Unusable(IMAGE_COUNT, f"{sum(marks)} {IMAGE} marks for {len(names)} images; one for each is needed")
    left = iter(names)
    return [[next(left) for _ in range(count)] for count in each], 0


def _names(record: dict, key: str) -> list[str]:
    value = record.get(key)
    names = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise _Unusable(MALFORMED, f'"{key}" is {str(value)[:SHOWN]!r}; a file name or a list of them is expected')
    return names
