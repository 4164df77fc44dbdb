"""The embedded world: what a scene is, and which scenes belong to which split.

A scene is two to six objects in the cells of a 3 x 3 grid and sometimes one printed word in a free
cell. Everything is a pure function of (split, seed). This module knows neither pixels (draw.py)
nor questions (questions.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
SIZES = ("small", "large")
PLACES = (
    "top left", "top", "top right",
    "left", "centre", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
WORDS = (
    "ANT", "APE", "BAT", "BEE", "CAT", "COD", "COW", "DOG", "EEL", "ELK", "EMU", "FOX",
    "GNU", "HEN", "OWL", "PIG", "BEAR", "BIRD", "CRAB", "CROW", "DEER", "DOVE", "DUCK", "FISH",
    "FROG", "GOAT", "HARE", "LION", "MOLE", "MOTH", "MULE", "NEWT", "PUMA", "SEAL", "SWAN", "TOAD",
    "WOLF", "WORM", "WREN", "ZEBRA", "CAMEL", "EAGLE", "GOOSE", "HORSE", "HYENA", "KOALA", "LLAMA", "MOOSE",
    "MOUSE", "OTTER", "PANDA", "PONY", "QUAIL", "RAVEN", "ROBIN", "SHARK", "SHEEP", "SKUNK", "SLOTH", "SNAIL",
    "SNAKE", "TIGER", "TROUT", "WHALE",
)  # fmt: skip
SPLITS = ("train", "validation", "test")

GRID = 3  # cells per side
HELD_OUT = 8  # (colour, shape) pairs per place and held-out split, of 64
SEED_SPACE = 1 << 40  # seeds of different splits live in different intervals


@dataclass(frozen=True)
class SceneObject:
    shape: str
    colour: str
    size: str
    place: int  # cell, raster order
    dx: float  # shift inside the cell, -1..1 of the free room
    dy: float

    @property
    def row(self) -> int:
        return self.place // GRID

    @property
    def column(self) -> int:
        return self.place % GRID

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """`objects` in raster order of their places; `word` (or None) stands in the cell `word_place`."""

    seed: int
    objects: tuple[SceneObject, ...]
    word: str | None
    word_place: int | None
    background: int  # seed of tint and texture


@cache
def allowed_pairs(split: str, place: int) -> tuple[tuple[str, str], ...]:
    """(colour, shape) pairs that may stand at `place` in `split`; the three splits share none."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; one of {', '.join(SPLITS)} is needed")
    pairs = [(c, s) for c in COLOURS for s in SHAPES]
    random.Random(f"pairs of place {place}").shuffle(pairs)
    bounds = {"test": (0, HELD_OUT), "validation": (HELD_OUT, 2 * HELD_OUT), "train": (2 * HELD_OUT, None)}
    start, end = bounds[split]
    return tuple(pairs[start:end])


def sample_scene(split: str, seed: int) -> Scene:
    """The scene number `seed` (0 .. 2**40 - 1) of a split."""
    if not 0 <= seed < SEED_SPACE:
        raise ValueError(f"seed is {seed}; 0 to {SEED_SPACE - 1} is needed")
    seed += SPLITS.index(split) * SEED_SPACE
    rng = random.Random(seed)
    count = rng.randint(2, 6)
    cells = rng.sample(range(len(PLACES)), min(count + 1, len(PLACES)))
    has_word = rng.random() < 0.4
    # A favoured colour and shape make repeated colours and shapes, hence counts above one, common.
    colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
    objects: list[SceneObject] = []
    for place in sorted(cells[:count]):
        taken = {(o.colour, o.shape) for o in objects}
        free = [p for p in allowed_pairs(split, place) if p not in taken]
        favoured = [p for p in free if colour in p or shape in p]
        c, s = rng.choice(favoured if favoured and rng.random() < 0.4 else free)
        jitter = rng.uniform(-1, 1), rng.uniform(-1, 1)
        objects.append(SceneObject(s, c, rng.choice(SIZES), place, *jitter))
    word = rng.choice(WORDS) if has_word else None
    return Scene(seed, tuple(objects), word, cells[count] if has_word else None, rng.getrandbits(32))
