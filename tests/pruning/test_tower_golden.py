"""Methods before the decoder against the authors' own functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from twigvlm.pruning import select
from twigvlm.pruning.methods import cdpruner, divprune, hiprune, holov, vispruner
from twigvlm.pruning.methods.visionzip import VisionZip, Zip
from twigvlm.pruning.plan import Shape
from twigvlm.pruning.reducer import View, best

LLAVA = Shape(32, 576, 2, 24)


# ---------------------------------------------------------------------- the authors' functions


def arrays(golden: Path, name: str) -> dict[str, torch.Tensor]:
    with np.load(golden / "pruning" / f"{name}.npz") as found:
        tensors = {key: torch.from_numpy(found[key]) for key in found.files}
    return {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}


def chosen(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


class Heads:
    """A layer's tap: attention [1, H, N] of the first token, and keys [1, N, d] of one head."""

    def __init__(self, attention: torch.Tensor, keys: torch.Tensor):
        self.attention, self.keys = attention, keys[:, None]

    def weights(self) -> torch.Tensor:
        return self.attention[:, :, None]


@pytest.mark.parametrize(("R", "contextual"), [(192, 30), (128, 20), (64, 10)])
def test_visionzip_is_the_authors(golden, R, contextual):
    data = arrays(golden, "functions")
    reducer = VisionZip().reducer(R, LLAVA)
    assert reducer == Zip(R, contextual)
    view = View(reducer, 576, 1, lambda x: x, None, [], states=data["visionzip_hidden"])
    view.taps[0] = Heads(data["visionzip_cls_attention"], data["visionzip_keys"])
    found = reducer(view)
    torch.testing.assert_close(
        found.features, data[f"visionzip_out_{R - contextual}_{contextual}"], atol=1e-5, rtol=1e-5
    )
    patches = [s for s in found.source[0].tolist() if s >= 0]
    assert found.source[0, 0] == -1 and len(set(patches)) == len(patches) == R - 1
    dominant, merged = patches[: R - 1 - contextual], patches[R - 1 - contextual :]
    assert dominant == sorted(dominant) and merged == sorted(merged)


@pytest.mark.parametrize("R", [192, 64])
def test_divprune_is_the_authors(golden, R):
    data = arrays(golden, "functions")
    found = divprune.diverse(select.cosine(data["divprune_features"])[None], R)
    assert found[0].tolist() == data[f"divprune_order_{R}"].tolist()


@pytest.mark.parametrize(("R", "ratio"), [(192, 0.5), (64, 0.5), (64, 0.75)])
def test_vispruner_is_the_authors(golden, R, ratio):
    data = arrays(golden, "functions")
    reducer = vispruner.VisPruner(ratio=ratio).reducer(R, LLAVA)
    similarity = select.cosine(data["vispruner_features"])
    # In one round patches 44 and 520 are equally similar, in fp32; the authors' sort, which is not stable, took 520 first.
    similarity[:, 520] += 2e-7
    found = vispruner.prune(data["vispruner_cls_attention"], similarity, R, reducer.important)
    assert found[0].tolist() == chosen(data[f"vispruner_mask_{R}_{ratio}"])


def test_scope_is_the_authors(golden):
    data = arrays(golden, "scope")
    found = select.covering(select.cosine(data["features"]), data["cls_attention_sum"], 192)
    assert found[0].tolist() == data["order_192"].tolist()


@pytest.mark.parametrize(("R", "alpha"), [(192, 0.1), (128, 0.1), (64, 0.1), (64, 0.5), (64, 0), (192, 0.5)])
def test_hiprune_is_the_authors(golden, R, alpha):
    data = arrays(golden, "hiprune")
    received = []
    for part in ("object", "deep"):
        weights = (data[f"{part}_q"] @ data[f"{part}_k"].transpose(1, 2) / 2).softmax(-1)
        received.append(weights.mean((0, 1))[None, 1:])
        torch.testing.assert_close(received[-1][0], data[f"{part}_scores"], atol=1e-5, rtol=1e-5)
    reducer = hiprune.HiPrune(alpha=alpha).reducer(R, LLAVA)
    assert reducer.anchors == round(R * alpha / 5)
    found = hiprune.choose(*received, R, reducer.anchors, 24)
    assert found[0].tolist() == chosen(data[f"mask_{R}_{alpha}"])


def test_hiprune_asks_the_authors_layers():
    reducer = hiprune.HiPrune().reducer(64, LLAVA)
    assert [layer for layer in range(24) if reducer.listens(layer, 22)] == [8, 22]


@pytest.mark.parametrize("attention", ["plain", "sink"])
@pytest.mark.parametrize(("R", "crops"), [(64, 16), (128, 8), (192, 5)])
def test_holov_is_the_authors(golden, attention, R, crops):
    data = arrays(golden, "holov")
    reducer = holov.HoloV().reducer(R, LLAVA)
    assert reducer.crops == crops
    scores = data[f"attention_{attention}"][None]
    found = holov.choose(scores, R, crops, False)[0].tolist()
    assert found == data[f"kept_{attention}_{crops}_{R}"].tolist()
    full = holov.choose(scores, R, crops, True)[0].tolist()
    assert -1 not in full and len(set(full)) == R
    kept = [i for i in found if i >= 0]
    assert set(kept) <= set(full) and (full == found if -1 not in found else len(kept) < R)


def test_fastervlm_keeps_what_is_looked_at_most():
    assert best(torch.tensor([[1.0, 5, 3, 5, 3, 0]]), 3).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("R", "grid"), [(192, (12, 16)), (128, (8, 16)), (64, (8, 8)), (576, (24, 24))])
def test_grids_of_the_tables(R, grid):
    high, wide = grid
    cells = select.cells(R, 24)
    rows = [int((i + 0.5) * 24 / high) for i in range(high)]
    columns = [int((j + 0.5) * 24 / wide) for j in range(wide)]
    assert [middle for _, _, middle in cells] == [24 * r + c for r in rows for c in columns]
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.arange(576.0).reshape(1, 24, 24), grid).flatten()
    found = [np.mean([24 * r + c for r in down for c in across]) for down, across, _ in cells]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float32), pooled)


def test_cdpruner_is_the_authors(golden):
    """The sets of one picture under one and two pieces of text; the carried golden set has the small case alone."""
    data = arrays(golden, "cdpruner")
    for pieces in (1, 2) if "features" in data else ():
        fit = cdpruner.clip_fit(data["image_embeds"], [data[f"text_embeds_{pieces}"]])
        matrix = cdpruner.kernel(data["features"], fit)
        for R in (192, 128, 64):
            assert sorted(select.spanning(matrix, R)[0].tolist()) == chosen(data[f"mask_{pieces}_{R}"])
        if pieces == 1:
            assert select.spanning(matrix, 64)[0].tolist() == data["order_1_64"].tolist()


def test_cdpruner_is_the_authors_but_for_what_two_pictures_share(golden):
    """In the authors' batch all pictures share one least and one largest relevance; here each has its own."""
    data = arrays(golden, "cdpruner")
    text = data["batch_text_embeds"]
    fit = cdpruner.clip_fit(data["batch_image_embeds"], [text, text])
    whole = (fit - fit.min() + cdpruner.LEAST) / (fit.max() - fit.min())
    shared = whole[:, :, None] * select.cosine(data["batch_features"]) * whole[:, None]
    for kernel, mask in zip(shared, data["batch_mask_16"], strict=True):
        assert sorted(select.spanning(kernel[None], 16)[0].tolist()) == chosen(mask)
    alone = [cdpruner.kernel(data["batch_features"][i : i + 1], fit[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(cdpruner.kernel(data["batch_features"], fit), torch.cat(alone))


def test_volume_that_is_used_up_leaves_no_nan():
    """Features of rank 3, five of eight tokens wanted, two of them the same."""
    features = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0))
    features[0, 5] = features[0, 2]
    order = select.spanning(select.cosine(features), 8)[0].tolist()
    assert sorted(order) == list(range(8))
    same = select.spanning(torch.ones(1, 4, 4), 4)
    assert same[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(10))
def test_a_token_that_adds_no_volume_changes_nothing_for_the_others(seed):
    """The same large token twice, and six small ones, which lie across it: their order is that without the second."""
    tokens = torch.randn(7, 12, generator=torch.Generator().manual_seed(seed)) * 1e-3
    tokens[0] *= 1e4
    both = torch.cat([tokens[:1], tokens])
    once = select.spanning((tokens @ tokens.T)[None], 7)[0].tolist()
    twice = select.spanning((both @ both.T)[None], 8)[0].tolist()
    assert once[0] == 0 and twice == [0, 1, *(i + 1 for i in once[1:])]
