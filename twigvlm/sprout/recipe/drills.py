"""Questions of the recipe's own, with denser answers than the benchmarks': the facts from which an answer of two hops follows.

"Is the red star left of the cross?" tells one bit about two objects; where a decoder cannot yet find
both, it learns nothing from it. A drill asks for what lies between: sizes, how two objects lie to
each other, the places of all that are to be counted, the letter of a named option.
"""

from __future__ import annotations

import random

from ...world.questions import LETTERS, Question, _references, ask, plural
from ...world.scenes import COLOURS, PLACES, SHAPES, WORDS, Scene


def _named(scene: Scene, rng: random.Random, count: int) -> list[tuple]:
    chosen = rng.sample(scene.objects, count)
    return [(obj, rng.choice([n for o, n in _references(scene) if o is obj])) for obj in chosen]


def size(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """One object's size."""
    [(obj, name)] = _named(scene, rng, 1)
    return rng.choice((f"Is {name} small or large?", f"What size is {name}?", f"How large is {name}?")), obj.size


def differ(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """How one object lies to another along both axes, which is larger, and whether they share colour and shape."""
    (one, name), (other, against) = _named(scene, rng, 2)
    signs = (one.column - other.column, one.row - other.row, (one.size == "large") - (other.size == "large"))
    words = (("same", "right", "left"), ("same", "below", "above"), ("same", "larger", "small"))
    told = [word[(sign > 0) - (sign < 0)] for word, sign in zip(words, signs, strict=True)]
    told += ["Yes" if getattr(one, aspect) == getattr(other, aspect) else "No" for aspect in ("colour", "shape")]
    return f"{name.capitalize()} and {against}?", ", ".join(told)


def counts(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """How often each colour or each shape is there, in the order in which they appear."""
    level = rng.choice(("colour", "shape"))
    values = [getattr(o, level) for o in scene.objects]
    return f"How many of each {level}?", ", ".join(f"{value}: {values.count(value)}" for value in dict.fromkeys(values))


def facts(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Names of some objects, each with its place behind it."""
    named = _named(scene, rng, min(3, len(scene.objects)))
    return "Where is each object?", ", ".join(
        f"{name.removeprefix('the ')}: {PLACES[obj.place]}" for obj, name in named
    )


def places(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """The places of all objects of a colour or a shape, of which there are several where that can be."""
    level = rng.choice(("colour", "shape"))
    values = [getattr(o, level) for o in scene.objects]
    value = rng.choice([v for v in values if values.count(v) > 1] or values)
    found = [PLACES[o.place] for o in scene.objects if getattr(o, level) == value]
    what = f"{value} objects" if level == "colour" else plural(value)
    return rng.choice((f"Where are the {what}?", f"Where in the image are the {what}?")), ", ".join(found)


def letters(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Options and their letters, each behind its option; the picture is not needed."""
    options = rng.sample(rng.choice((COLOURS, SHAPES, PLACES, WORDS, tuple("0123456"))), len(LETTERS))
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    told = rng.sample(tuple(zip(LETTERS, options, strict=True)), len(LETTERS))
    return "\n".join(["Which letters?", *lines]), ", ".join(f"{option}: {letter}" for letter, option in told)


def reasoned(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A choice whose answer names the option before its letter."""
    question = None
    while question is None:
        question = ask(scene, "choice", rng)
    text = "\n".join([*question.text.split("\n")[:-1], "Answer with the option and its letter."])
    return text, f"{question.options[LETTERS.index(question.answer)]}: {question.answer}"


DRILLS = {
    size: 0.5,
    differ: 4,
    counts: 3,
    facts: 3,
    places: 1,
    letters: 1.5,
    reasoned: 3,
}  # and how often each is drawn


def drill(scene: Scene, rng: random.Random) -> Question:
    """One of DRILLS about a scene."""
    kind = rng.choices(tuple(DRILLS), tuple(DRILLS.values()))[0]
    text, answer = kind(scene, rng)
    return Question(kind.__name__, text, answer)
