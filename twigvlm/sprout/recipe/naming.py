"""Which tokens of a text name something, and where in the picture that stands."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ...prompt.template import encode
from ...world.questions import plural
from ...world.scenes import COLOURS, PLACES, SHAPES, Scene


@lru_cache(maxsize=100_000)
def encoded(tokenizer, text: str) -> tuple[int, ...]:
    """Most questions come up again and again; encoding was two thirds of a batch's cost."""
    return tuple(encode(tokenizer, text, -1, 0, bos=False))


def looks(ids: Sequence[int], scene: Scene, tokenizer) -> list[int]:
    """For each token, the cells (as bits) of the objects that it names: what a reader would look at.

    The last word of "red circle" means both, "top left" one cell, "word" the printed word.
    """
    names = _names(tokenizer)
    out, colour, place = [], None, []
    for i, token in enumerate(ids):
        kind, value = names.get(token, ("", ""))
        place = [*place, value] if kind == "place" else []
        cells = 0
        if kind in ("colour", "shape", "object"):
            for obj in scene.objects:
                fits = (kind != "shape" or obj.shape == value) and (colour is None or obj.colour == colour)
                if kind == "colour":
                    fits = obj.colour == value
                if fits and (kind != "object" or colour):
                    cells |= 1 << obj.place
        elif kind == "place" and (i + 1 == len(ids) or names.get(ids[i + 1], ("", ""))[0] not in ("place", "of")):
            cells = 1 << PLACES.index(" ".join(place)) if " ".join(place) in PLACES else 0
        elif kind == "text" and scene.word:
            cells = 1 << scene.word_place
        colour = value if kind == "colour" else None
        out.append(cells)
    return out


@lru_cache
def _names(tokenizer) -> dict[int, tuple[str, str]]:
    """Token id → what kind of name it is."""
    words = [(c, "colour") for c in COLOURS] + [(s, "shape") for s in SHAPES]
    words += [(p, "place") for p in ("top", "bottom", "left", "right", "centre")] + [("of", "of"), ("or", "of")]
    words += [("object", "object"), ("objects", "object"), ("word", "text"), ("text", "text")]
    table = {encoded(tokenizer, word)[0]: (kind, word) for word, kind in words}
    for shape in SHAPES:
        table[encoded(tokenizer, plural(shape))[0]] = ("shape", shape)
    return table
