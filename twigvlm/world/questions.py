"""Questions with exact answers about a scene, and its full description.

Every question is a pure function of (scene, kind, random generator). Answers follow LLaVA's habits:
"Yes" and "No", lower-case words, digits, option letters.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .scenes import COLOURS, PLACES, SHAPES, WORDS, Scene, SceneObject

SINGLE_WORD = "Answer the question using a single word or phrase."
YES_NO = "Please answer yes or no."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """`text` is what a user would type, hints included; `options` only for multiple choice."""

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()


def _yes(value: bool) -> str:
    return "Yes" if value else "No"


def _at(place: int) -> str:
    return f"in the {PLACES[place]}" if PLACES[place] == "centre" else f"at the {PLACES[place]}"


def plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _unique(scene: Scene, key: Callable[[SceneObject], str]) -> list[SceneObject]:
    """The objects whose `key` no other object of the scene shares."""
    keys = [key(o) for o in scene.objects]
    return [o for o, k in zip(scene.objects, keys, strict=True) if keys.count(k) == 1]


def _references(scene: Scene) -> list[tuple[SceneObject, str]]:
    """Each object under every short name that fits it alone."""
    by_name = [(o, f"the {o.name}") for o in scene.objects]
    by_shape = [(o, f"the {o.shape}") for o in _unique(scene, lambda o: o.shape)]
    by_colour = [(o, f"the {o.colour} object") for o in _unique(scene, lambda o: o.colour)]
    return by_name + by_shape + by_colour


def _exist(scene: Scene, rng: random.Random) -> tuple[str, str]:
    names = {o.name for o in scene.objects}
    wanted = rng.random() < 0.5
    level = rng.choice(("name", "name", "shape", "colour"))
    if level == "name":
        if wanted:
            what = rng.choice(sorted(names))
        else:  # half of the absent ones pair a colour and a shape that are both in the picture
            near = [f"{a.colour} {b.shape}" for a in scene.objects for b in scene.objects]
            every = [f"{c} {s}" for c in COLOURS for s in SHAPES]
            pool = [n for n in (near if rng.random() < 0.5 else every) if n not in names]
            what = rng.choice(pool or [n for n in every if n not in names])
    else:
        values = SHAPES if level == "shape" else COLOURS
        present = {getattr(o, level) for o in scene.objects}
        what = rng.choice([v for v in values if (v in present) == wanted])
        what += " object" if level == "colour" else ""
    article = "an" if what[0] in "aeiou" else "a"
    text = rng.choice(
        (
            f"Is there {article} {what} in the image?",
            f"Is there {article} {what}?",
            f"Can you see {article} {what} in the picture?",
        )
    )
    return text, _yes(wanted)


def _colour(scene: Scene, rng: random.Random) -> tuple[str, str]:
    named = [(o, f"the {o.shape}") for o in _unique(scene, lambda o: o.shape)]
    placed = [(o, f"the object {_at(o.place)}") for o in scene.objects]
    obj, what = rng.choice(named if named and rng.random() < 0.5 else placed)
    text = rng.choice((f"What colour is {what}?", f"What is the colour of {what}?", f"Which colour does {what} have?"))
    return text, obj.colour


def _shape(scene: Scene, rng: random.Random) -> tuple[str, str]:
    named = [(o, f"the {o.colour} object") for o in _unique(scene, lambda o: o.colour)]
    placed = [(o, f"the object {_at(o.place)}") for o in scene.objects]
    obj, what = rng.choice(named if named and rng.random() < 0.5 else placed)
    text = rng.choice((f"What shape is {what}?", f"What is the shape of {what}?", f"Which shape does {what} have?"))
    return text, obj.shape


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    level = rng.choice(("all", "colour", "shape"))
    if level == "all":
        what, number = "objects", len(scene.objects)
    else:
        values = [getattr(o, level) for o in scene.objects]
        absent = rng.choice([v for v in (COLOURS if level == "colour" else SHAPES) if v not in values])
        value = absent if rng.random() < 0.15 else rng.choice(values)
        what = f"{value} objects" if level == "colour" else plural(value)
        number = values.count(value)
    text = rng.choice((f"How many {what} are there?", f"How many {what} are in the image?", f"Count the {what}."))
    return text, str(number)


def _where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    obj, what = rng.choice(_references(scene))
    text = rng.choice(
        (f"Where is {what}?", f"Where in the image is {what}?", f"In which part of the picture is {what}?")
    )
    return text, PLACES[obj.place]


_RELATIONS: dict[str, Callable[[SceneObject, SceneObject], int]] = {
    # Positive: it holds; negative: its opposite holds; zero: neither.
    "left of": lambda a, b: b.column - a.column,
    "right of": lambda a, b: a.column - b.column,
    "above": lambda a, b: b.row - a.row,
    "below": lambda a, b: a.row - b.row,
}


def _relation(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    first, second = rng.sample(scene.objects, 2)
    clear = [(name, sign(first, second)) for name, sign in _RELATIONS.items() if sign(first, second)]
    wanted = rng.random() < 0.5
    fitting = [name for name, sign in clear if (sign > 0) == wanted]
    names = [rng.choice([n for o, n in _references(scene) if o is obj]) for obj in (first, second)]
    if rng.random() < 0.7:
        relation = rng.choice(fitting)
        return f"Is {names[0]} {relation} {names[1]}?", _yes(wanted)
    pairs = [p for p in (("left of", "right of"), ("above", "below")) if dict(clear).get(p[0])]
    one, other = rng.choice(pairs)
    text = f"Is {names[0]} {one} or {other} {names[1]}?"
    return text, (one if dict(clear)[one] > 0 else other).removesuffix(" of")


def _compare(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    aspect = rng.choice(("size", "size", "colour", "shape", "more"))
    wanted = rng.random() < 0.5
    if aspect == "more":
        level, name = rng.choice((("colour", lambda v: f"{v} objects"), ("shape", plural)))
        values = [getattr(o, level) for o in scene.objects]
        pairs = [(a, b) for a in set(values) for b in set(values) if a != b]
        pairs = sorted(p for p in pairs if (values.count(p[0]) > values.count(p[1])) == wanted)
        if not pairs:
            return None
        one, other = rng.choice(pairs)
        return f"Are there more {name(one)} than {name(other)}?", _yes(wanted)
    pairs = [(a, b) for a in scene.objects for b in scene.objects if a is not b]
    if aspect == "size":
        pairs = [(a, b) for a, b in pairs if ((a.size, b.size) == ("large", "small")) == wanted]
    else:
        pairs = [(a, b) for a, b in pairs if (getattr(a, aspect) == getattr(b, aspect)) == wanted]
    if not pairs:
        return None
    names = [rng.choice([n for o, n in _references(scene) if o is obj]) for obj in rng.choice(pairs)]
    if aspect == "size":
        return f"Is {names[0]} larger than {names[1]}?", _yes(wanted)
    return f"Do {names[0]} and {names[1]} have the same {aspect}?", _yes(wanted)


def _read(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if rng.random() < 0.2:
        return rng.choice(("Is there a word in the image?", "Is there any text in the picture?")), _yes(
            bool(scene.word)
        )
    if not scene.word:
        return None
    text = rng.choice(
        ("What word is written in the image?", "What does the text say?", "Which word can be read in the picture?")
    )
    return text, scene.word


_ASK: dict[str, Callable[[Scene, random.Random], tuple[str, str] | None]] = {
    "exist": _exist,
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "where": _where,
    "relation": _relation,
    "compare": _compare,
    "read": _read,
}
_OPTIONS = {"colour": COLOURS, "shape": SHAPES, "where": PLACES, "read": WORDS, "count": tuple("0123456")}
KINDS = (*_ASK, "choice")  # the short answers


def _choice(scene: Scene, rng: random.Random) -> Question | None:
    kind = rng.choice(tuple(_OPTIONS))
    asked = _ASK[kind](scene, rng)
    if asked is None or asked[1] in ("Yes", "No"):
        return None
    text, answer = asked
    options = rng.sample([o for o in _OPTIONS[kind] if o != answer], len(LETTERS) - 1)
    options.insert(rng.randrange(len(LETTERS)), answer)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return Question("choice", "\n".join([text, *lines, LETTER]), LETTERS[options.index(answer)], tuple(options))


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of this kind, or None when the scene has none (no word to read, say)."""
    if kind == "choice":
        return _choice(scene, rng)
    if kind == "describe":
        return Question("describe", rng.choice(DESCRIBE), describe(scene))
    asked = _ASK[kind](scene, rng)
    if asked is None:
        return None
    text, answer = asked
    hints = ["", "", f"\n{SINGLE_WORD}"] + ([f" {YES_NO}"] if answer in ("Yes", "No") else [])
    return Question(kind, text + rng.choice(hints), answer)


DESCRIBE = (
    "Describe the image in detail.",
    "What is in the image?",
    "Describe every object in the picture.",
    "Please tell me everything that you see.",
)


def describe(scene: Scene) -> str:
    """Every object with place, size, colour and shape in raster order, then the word."""
    sentences = [f"There are {len(scene.objects)} objects in the image."]
    for obj in scene.objects:
        article = "an" if obj.size[0] in "aeiou" else "a"
        place = _at(obj.place)
        sentences.append(f"{place[0].upper()}{place[1:]} there is {article} {obj.size} {obj.name}.")
    if scene.word:
        sentences.append(f"The word {scene.word} is written {_at(scene.word_place)}.")
    else:
        sentences.append("There is no text.")
    return " ".join(sentences)
