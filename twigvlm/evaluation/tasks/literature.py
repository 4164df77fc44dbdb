"""Published accuracies of pruning methods on LLaVA-1.5-7B, by source, to stand beside measured ones. Not measured here.

Several papers ran the same methods and disagree by one to four points; each row says whose it is. R is
the label of the paper's column, which is not always the average that enters a layer (`note`). Scores
as in the papers: percent, MME in points (perception and cognition; `mme_perception` where a paper gives that alone).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .published import ROWS as PAPER

MODEL = "llava-1.5-7b"
UNPRUNED = "unpruned"  # the base alone, as a comparison calls it
SEVEN = ("gqa", "mmbench", "mme", "textvqa", "sqa", "vqav2", "pope")


@dataclass(frozen=True)
class Origin:
    """Who measured; `base` is the unpruned row that its ratios refer to."""

    name: str
    base: Mapping[str, float]


@dataclass(frozen=True)
class Reported:
    """One published row; `method` as `--pruning` has it."""

    method: str
    R: float | None
    source: str
    scores: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def _scores(text: str) -> dict[str, float]:
    """`59.5|64.1|1787|57.8|68.7|-|85.3` in the order of SEVEN; a p behind a number means MME's perception alone."""
    found = {}
    for name, cell in zip(SEVEN, (c.strip() for c in text.split("|")), strict=True):
        if cell != "-":
            found["mme_perception" if cell.endswith("p") else name] = float(cell.removesuffix("p"))
    return found


UPPER = _scores("61.9|64.7|1862|58.2|69.5|78.5|85.9")
SOURCES = {
    "twigvlm": Origin("TwigVLM, arXiv 2503.14075", UPPER),
    "sparsevlm": Origin("SparseVLM, ICML 2025", UPPER),
    "rerun": Origin("a re-run of all official code in one environment, 2026", UPPER),
    "sieve": Origin("SIEVE, arXiv 2608.10489", UPPER),
    "tops": Origin("TOPS, arXiv 2606.27161", _scores("61.9|64.7|1506.5p|58.2|69.5|-|85.9")),
    "trevs": Origin("TReVS, 2026", _scores("61.9|64.7|1862|58.2|69.5|-|85.9")),
    "occamtoken": Origin("OccamToken, arXiv 2605.29657", UPPER),
    "cdpruner": Origin("a re-run of CDPruner's code", _scores("61.9|64.7|1513.4p|58.2|69.6|78.5|85.9")),
    "dart": Origin("DART, EMNLP 2025", UPPER),
    "holov": Origin("HoloV, arXiv 2510.02912", UPPER),
    "hiprune": Origin("a re-run of HiPrune's code", _scores("61.9|64.7|1513.4p|58.2|69.6|78.5|85.9")),
    "scope": Origin("SCOPE, as SIEVE reprints it", UPPER),
}

ENTERING = {192: "219.8", 128: "159.8", 64: "99.8"}
RECOUNTED = {192: "206.5", 128: "145.4", 64: "82.3"}
_TABLES: Mapping[str, Mapping[str, Mapping[int, str]]] = {
    "twigvlm": {  # what `published` leaves out
        "pdrop": {128: "57.1|61.6|1761|56.6|68.4|72.9|-", 64: "47.5|58.8|1561|50.6|69.0|69.2|-"},
        "fastervlm": {64: "51.5|58.5|1573|53.1|69.6|66.8|-"},
    },
    "sparsevlm": {
        "sparsevlm": {192: "59.5|64.1|1787|57.8|68.7|-|85.3", 128: "58.4|64.5|1746|56.7|68.6|-|85.0", 64: "53.8|60.1|1589|53.4|69.8|-|77.5"},
        "tome": {192: "54.3|60.5|1563|52.1|65.2|68.0|72.4", 128: "52.4|53.3|1343|49.1|59.6|63.0|62.8", 64: "48.6|43.7|1138|45.3|50.0|57.1|52.5"},
        "fastv": {192: "52.6|61.0|1605|52.5|69.1|-|64.8", 128: "49.6|56.1|1490|50.5|68.6|-|53.4", 64: "46.1|47.2|1255|47.8|68.7|-|38.2"},
        "pdrop": {192: "57.1|63.2|1766|56.1|70.2|-|82.3", 128: "56.0|61.1|1664|55.1|69.9|-|82.3", 64: "41.9|33.3|1092|45.9|69.2|-|55.9"},
    },
    "rerun": {
        "fastv": {192: "57.1|64.4|1821|57.8|68.9|74.7|75.8", 128: "54.1|63.1|1694|56.3|69.3|70.7|68.3", 64: "46.4|51.4|1284|51.6|69.9|56.2|36.1"},
        "pdrop": {192: "58.0|62.9|1790|57.1|68.9|76.0|84.0", 128: "51.6|54.9|1403|52.6|68.8|65.6|67.8", 64: "49.0|55.6|1404|50.6|69.5|60.1|55.5"},
        "sparsevlm": {192: "59.5|64.2|1782|57.7|68.7|77.0|85.4", 128: "58.4|64.4|1761|56.6|68.7|76.2|85.0", 64: "53.8|60.2|1591|53.5|69.7|70.3|77.5"},
        "tome": {192: "59.5|62.6|1727|55.8|69.0|75.9|86.9", 128: "58.7|60.7|1668|54.8|68.4|74.5|86.5", 64: "56.0|57.9|1588|52.6|68.0|71.7|84.3"},
        "visionzip": {192: "59.2|62.5|1749|55.8|68.7|77.2|85.2", 128: "58.5|61.4|1705|55.6|68.8|76.7|83.2", 64: "56.0|60.5|1690|53.8|69.5|75.2|78.2"},
        "divprune": {192: "58.9|63.1|1723|55.7|69.0|76.1|86.5", 128: "58.6|63.7|1702|55.2|68.9|75.2|86.5", 64: "57.1|60.2|1653|54.5|68.3|73.3|85.3"},
        "vispruner": {192: "59.4|62.5|1784|57.7|68.3|76.5|86.0", 128: "58.1|61.9|1778|56.9|68.8|75.3|84.5", 64: "55.8|60.0|1670|55.6|68.5|72.3|80.5"},
        "holov": {192: "58.6|62.6|1779|55.8|67.3|76.0|85.0", 128: "57.5|62.5|1761|55.6|69.0|75.0|82.2", 64: "55.1|60.0|1699|54.9|68.6|72.3|76.8"},
    },
    "sieve": {"sieve": {192: "60.6|64.6|1820|57.8|68.9|77.8|85.5", 128: "59.8|64.0|1815|57.6|68.8|77.1|85.8", 64: "58.0|62.2|1740|56.5|69.0|75.2|83.5"}},
    "tops": {"tops": {128: "60.5|62.5|1482.7p|57.0|68.2|-|86.8", 64: "58.7|60.9|1442.7p|56.2|68.6|-|86.5"}},
    "trevs": {"trevs": {128: "60.3|63.6|1842|57.8|68.9|-|86.5", 64: "57.8|61.9|1769|56.6|68.9|-|85.2"}},
    "occamtoken": {"occamtoken": {128: "60.9|63.9|1825|58.0|69.1|77.9|86.3", 64: "59.3|63.2|1801|57.4|69.0|77.2|86.2"}},
    "cdpruner": {"cdpruner": {128: "59.3|62.4|1431.4p|56.0|69.0|76.2|87.3", 64: "58.6|61.1|1399.1p|54.7|68.1|75.0|87.0"}},
    "dart": {"dart": {192: "60.0|63.6|1856|57.4|69.8|76.7|82.8", 128: "58.7|63.2|1840|56.4|69.1|75.9|80.1", 64: "55.9|60.6|1765|54.4|69.8|72.4|73.9"}},
    "holov": {"holov": {192: "59.0|65.4|1820|57.4|69.8|76.7|85.6", 128: "57.7|63.9|1802|56.8|69.8|75.5|84.0", 64: "55.3|63.3|1715|55.4|69.5|72.8|80.3"}},
    "hiprune": {"hiprune": {128: "57.3|62.2|1364.4p|56.2|68.3|74.9|82.8", 64: "53.6|59.5|1236.0p|54.2|68.9|69.2|73.0"}},
    "scope": {"scope": {192: "60.1|63.6|1804|57.7|68.8|77.2|86.4", 128: "59.7|62.5|1776|57.2|68.4|76.5|86.1", 64: "58.3|61.7|1698|56.6|68.6|75.3|83.9"}},
}  # fmt: skip
_NOTES: Mapping[str, Mapping[int, str]] = {
    "sparsevlm": {R: f"R counts tokens that leave a layer; {n} enter" for R, n in RECOUNTED.items()},
    "dart": {R: f"in truth {n} tokens enter a layer" for R, n in ENTERING.items()},
    "tops": {128: "in truth 152 tokens enter a layer", 64: "in truth 76 tokens enter a layer"},
    "trevs": {128: "in truth 133.1 tokens enter a layer", 64: "in truth 66.2 tokens enter a layer"},
    "occamtoken": dict.fromkeys((128, 64), "R is the mean of the final set; more tokens enter the lower layers"),
    "fastervlm": {64: "probably of 29 tokens, a reduction by 95 %"},
    "sparsevlm:version=1.0": dict.fromkeys((192, 128, 64), "average over samples of what leaves a layer"),
    "mustdrop": dict.fromkeys((192, 128, 64), "average over samples of what leaves a layer"),
}
# The TwigVLM paper's rows stand in `published`; here are their names as `--pruning` has them, and POPE of its second table.
_NAMES = {
    "TwigVLM": "twig", "FastV": "fastv", "SparseVLM": "sparsevlm:version=1.0", "PDrop": "pdrop", "MustDrop": "mustdrop",
    "VisionZip": "visionzip", "VisionZip*": "visionzip*",
}  # fmt: skip
_POPE: Mapping[str, Mapping[int, float]] = {
    "twig": {192: 87.2, 128: 86.6, 64: 82.7}, "fastv": {192: 79.2, 128: 73.2, 64: 55.6},
    "sparsevlm:version=1.0": {192: 83.6, 128: 80.5, 64: 75.1}, "pdrop": {192: 82.3, 128: 82.3, 64: 55.9},
    "mustdrop": {192: 82.6, 128: 78.7, 64: 68.0}, "visionzip": {192: 85.3, 128: 83.2, 64: 77.0},
    "visionzip*": {192: 84.9, 128: 83.7, 64: 80.9}, "fastervlm": {64: 67.2},
}  # fmt: skip


def _row(method: str, R: float, source: str, scores: Mapping[str, float]) -> Reported:
    pope = _POPE.get(method, {}).get(int(R)) if source == "twigvlm" else None
    known = {**scores, **({"pope": pope} if pope is not None else {})}
    return Reported(method, float(R), source, known, _NOTES.get(method, {}).get(int(R), ""))


ROWS = (
    Reported(UNPRUNED, None, "twigvlm", UPPER),
    *(_row(_NAMES[one.method], one.R, "twigvlm", one.scores) for one in PAPER if one.method in _NAMES and one.scores),
    *(
        _row(method, R, source, _scores(text))
        for source, methods in _TABLES.items()
        for method, budgets in methods.items()
        for R, text in budgets.items()
    ),
)


def reported(method: str, R: float | None, model: str, drafts: bool = False) -> Iterator[Reported]:
    """The published rows of a setting: of plain pruning on this model, under the same name and label."""
    if model == MODEL and not drafts:
        yield from (row for row in ROWS if (row.method, row.R) == (method, R))


def model_of(name: str) -> str:
    """The published model that a base's name speaks of, "" for none: `llava-v1.5-7b`, `llava-1.5-7b-hf`."""
    folded = name.casefold().replace("_", "-").replace("-v1.5", "-1.5")
    return MODEL if MODEL in folded else ""
