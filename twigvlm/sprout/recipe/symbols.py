"""What a patch shows, in words: the symbols by which a decoder learns to talk before it sees.

A symbol is the sum of the embeddings of up to eight words: what a perfect tower and projector would say of the patch.
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from ...prompt.template import encode
from ...world.draw import patch_labels
from ...world.scenes import COLOURS, GRID, PLACES, SHAPES, SIZES, WORDS, Scene
from .tower import SIDE

MARK, NOTHING = "object", "image"  # the words for an object's centre and for an empty patch
SYMBOLS = 8  # tokens that describe one patch, at most
SPAN = SIDE // GRID  # patches along a cell
CELL_BITS = [1 << ((p // SIDE // SPAN) * GRID + p % SIDE // SPAN) for p in range(SIDE * SIDE)]
CELLS = [
    [(r * SPAN + i) * SIDE + c * SPAN + j for i in range(SPAN) for j in range(SPAN)]
    for r in range(GRID)
    for c in range(GRID)
]
CELL_CENTRES = [cell[len(cell) // 2 + SPAN // 2] for cell in CELLS]


def patch_symbols(scene: Scene, tokenizer) -> torch.Tensor:
    """What each patch shows, in words: token ids [576, SYMBOLS], 0 = none.

    The sum of these words' embeddings is what a perfect tower and projector would say.
    """
    labels = patch_labels(scene).reshape(-1, 5)
    out = np.zeros((len(labels), SYMBOLS), np.int64)
    out[:, 3:6] = _place_words(tokenizer)
    words = [word_ids(tokenizer, names) for names in (SHAPES, COLOURS, SIZES)]
    for i, table in enumerate(words):
        out[:, i] = np.concatenate([[0], table])[labels[:, i]]
    out[:, 6] = np.concatenate([[0], word_ids(tokenizer, WORDS)])[labels[:, 3]]
    empty = (labels[:, 0] == 0) & (labels[:, 3] == 0)
    out[empty, 6] = word_ids(tokenizer, (NOTHING,))[0]
    out[labels[:, 4] == 1, 7] = word_ids(tokenizer, (MARK,))[0]
    return torch.from_numpy(out)


def cell_symbols(scene: Scene, tokenizer) -> torch.Tensor:
    """One patch for each cell of the grid, the one that tells most: token ids [9, SYMBOLS]."""
    symbols = patch_symbols(scene, tokenizer).numpy()
    told = (symbols > 0).sum(1) + (symbols[:, 6] != word_ids(tokenizer, (NOTHING,))[0])
    cells = np.array(CELLS)
    return torch.from_numpy(symbols[cells[np.arange(len(cells)), told[cells].argmax(1)]])


@lru_cache
def word_ids(tokenizer, words: tuple[str, ...]) -> np.ndarray:
    return np.array([encode(tokenizer, word, -1, 0, bos=False)[0] for word in words])


@lru_cache
def _place_words(tokenizer) -> np.ndarray:
    """[576, 3]: the words of the cell that each patch lies in."""
    names = [PLACES[(r // SPAN) * GRID + c // SPAN].split() for r in range(SIDE) for c in range(SIDE)]
    return np.array([[*word_ids(tokenizer, tuple(n)), 0, 0][:3] for n in names])


def spell(symbols: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Ids [..., SYMBOLS] → the sum of their rows of the embedding table [..., D]."""
    return (F.embedding(symbols, table) * (symbols > 0)[..., None]).sum(-2)


def stratified(share: float, rng: random.Random) -> torch.Tensor:
    """One patch of every block of `1/share` (a square number) patches, raster order."""
    block = round(share**-0.5)
    steps = range(0, SIDE, block)
    picks = [(r + rng.randrange(block)) * SIDE + c + rng.randrange(block) for r in steps for c in steps]
    return torch.tensor(sorted(picks))
