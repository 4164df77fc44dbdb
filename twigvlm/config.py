"""What a twig is and what a generation is: frozen dataclasses that refuse nonsense when made."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from .errors import InputError
from .files import BROUGHT

DEFAULT_K, DEFAULT_T = 2, 3  # the released twigs', paper section 4.1
WIPE_SHARE = 0.75  # F / L of LLaVA-1.5-7B, paper section 3.2
FORMAT_VERSION = 1
AUTO = "auto"
IMAGE = "<image>"  # a picture in a text
HeadStart = Literal["released", "identity"]  # how a pruning head begins, and which gates it has: model.pruning_head
STARTS = get_args(HeadStart)
BACKENDS = ("sdpa", "eager", "flash_attention_2")  # attention implementations
SHAPES = {  # random bases: width, feed-forward width, layers, heads: the Vicuna of each LLaVA-1.5
    "llava-1.5-7b": (4096, 11008, 32, 32),
    "llava-1.5-13b": (5120, 13824, 40, 40),
}
MOST_NODES = 256  # of a draft; who sees whom is a table of its square
DIGITS = 9  # of a number that is written in a text: more stay words, and are refused as such
SHOWN = 80  # letters of a value that a message repeats


@dataclass(frozen=True)
class TwigConfig:
    """Where a twig grows on a base of L layers: T layers on top of layer K, image gone before layer F.

    F = L or more means that the image is never wiped. Raises InputError on an impossible combination.
    """

    L: int
    K: int = DEFAULT_K
    T: int = DEFAULT_T
    F: int = 0  # 0: round(0.75 L)
    pruning_head: str = ""  # a HeadStart; "": the twig has none

    def __post_init__(self) -> None:
        for letter in "LKTF":
            if not _whole(value := getattr(self, letter)):
                raise InputError(f"{letter} is {value!r}; a whole number of layers is needed")
        if self.F == 0:
            object.__setattr__(self, "F", max(self.K + 1, round(WIPE_SHARE * self.L)))
        if self.K < 0:
            raise InputError(f"K is {self.K}; it counts the base layers below the twig (K >= 0)")
        if self.T < 1:
            raise InputError(f"T is {self.T}; a twig has at least one layer (T >= 1)")
        if self.K + self.T > self.L:
            raise InputError(
                f"K + T is {self.K} + {self.T} = {self.K + self.T}, but the base has only L = {self.L} layers; "
                f"choose K + T <= {self.L}"
            )
        if self.F <= self.K:
            raise InputError(
                f"wipe layer F is {self.F}, but must lie above K = {self.K}; choose {self.K + 1} to {self.L} "
                f"({self.L} = never wipe)"
            )


def option(default: Any, text: str, *also: str, **more: Any) -> Any:
    """A field that is a flag: its help, other names of the flag, and `more` of `twigvlm.flags` and argparse."""
    value = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**value, metadata={"help": text, **({"aliases": list(also)} if also else {}), **more})


class TreeShape(NamedTuple):
    """Of a draft that branches: E children a node, W nodes of a level have children, D levels, N nodes are verified."""

    E: int
    W: int
    D: int
    N: int

    def __str__(self) -> str:
        return ",".join(map(str, self))

    @property
    def most(self) -> int:
        """Nodes that there are to choose from."""
        total = level = self.E
        for _ in range(self.D - 1):
            level = min(level, self.W) * self.E
            total += level
        return total


def tree_shape(given: str | Sequence[int]) -> TreeShape:
    """ "E,W,D,N" (or with semicolons) or four numbers. Raises InputError for what is no tree that can be drafted."""
    words = given.replace(";", ",").split(",") if isinstance(given, str) else given
    words = words if isinstance(words, Sequence) else []
    numbers = [int(w) if isinstance(w, str) and w.strip().isdecimal() and len(w) <= DIGITS else w for w in words]
    if len(numbers) != 4 or not all(_whole(n) and n >= 1 for n in numbers):
        told = repr(given)
        raise InputError(
            f"tree is {told if len(told) <= SHOWN else told[:SHOWN] + '…'}; four whole numbers E,W,D,N are needed, each 1 or more (children of a node, nodes of a level that "
            "have children, levels, nodes that are verified), such as 3,2,4,8, or 'auto'"
        )
    shape = TreeShape(*numbers)

    def check(ok: bool, what: str) -> None:
        if not ok:
            raise InputError(f"tree is {shape}: {what}")

    E, W, D, N = shape
    check(N <= MOST_NODES, f"N is {N}; at most {MOST_NODES} nodes are verified at once")
    for letter, value in (("E", E), ("W", W), ("D", D)):
        larger = f" or N >= {value}" if value <= MOST_NODES else ""
        check(value <= N, f"{letter} is {value}, but N={N} nodes cannot be so many; choose {letter} <= {N}{larger}")
    check(E > 1 or W == 1, f"W is {W}, but with E=1 a level has one node; choose W=1 (a chain) or E >= 2")
    most = shape.most
    check(most >= N, f"N is {N}, but E={E}, W={W}, D={D} give {most} nodes to choose from; choose N <= {most}")
    return shape


HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^@\s]+))?")  # owner/name, or owner/name@REVISION


def hub_id(name: str | Path | None) -> str | None:
    """owner/name of what may be on the hub, without its revision; None for what is on this disk, or no such name."""
    return split_name(name)[0]


def split_name(name: str | Path | None) -> tuple[str | None, str | None]:
    """(owner/name, revision) of what may be on the hub; (None, None) for what is on this disk, or no such name."""
    text = "" if name is None else str(name)
    match = HUB_NAME.fullmatch(text)
    if match is None or text.startswith(".") or Path(text).expanduser().exists():
        return None, None
    return match[1], match[2]


def pinned(base: str | Path | None, twig: str | Path | None, revision: str | None, twig_revision: str | None):
    """(base, twig) with their revisions behind their names: owner/name@REVISION.

    `revision` is the base's, and the twig's where only that is on the hub. Raises InputError for a revision of what is
    not there, or another one than a name says. A twig that comes along has its folder's name ("sprout-plus").
    """
    twig = _brought(twig)
    if revision is not None and hub_id(base) is None and hub_id(twig) is not None and twig_revision is None:
        revision, twig_revision = None, revision
    return _pin(base, revision, "revision", "the base"), _pin(twig, twig_revision, "twig_revision", "the twig")


def _brought(twig: str | Path | None) -> str | Path | None:
    """The folder of a twig of the embedded base that is called by its name alone."""
    if not isinstance(twig, str) or Path(twig).name != twig or Path(twig).exists():
        return twig
    folder = BROUGHT / "checkpoints" / twig
    return folder if twig and folder.is_dir() else twig


def _pin(name: str | Path | None, revision: str | None, option: str, what: str) -> str | Path | None:
    if revision is None:
        return name
    known, said = split_name(name)
    if known is None:
        here = "not given" if name is None else f"{name}, no hub id of the form owner/name"
        raise InputError(
            f"{option} is {revision!r}, but {what} is {here}; only what is on the hub has revisions: leave {option} away"
        )
    if not HUB_NAME.fullmatch(f"{known}@{revision}"):
        raise InputError(f"{option} is {revision!r}; a commit, branch or tag of {known} is needed")
    if said not in (None, revision):
        raise InputError(f"{option} is {revision!r}, but {name} names another revision; give one of them")
    return f"{known}@{revision}"


def whole_or_auto(text: str) -> int | str:
    """A draft length as people write it."""
    return AUTO if text == AUTO else int(text)


@dataclass(frozen=True)
class ModelSettings:
    """Which model: the arguments of `twigvlm.load`."""

    base: str | Path | None = option(
        None,
        "hub id or folder of a LLaVA-1.5 model (default: the embedded one)",
        flag="base_model",
        parse=str,
        metavar="ID",
    )
    twig: str | Path | None = option(
        None, "hub id, folder or .safetensors of its twig (default: none, or the embedded one; sprout-plus: TwigVLM++'s)",
        flag="twig_block", parse=str, metavar="ID",
    )  # fmt: skip
    K: int | None = option(
        None, "base layers below the twig (default: from the twig's files, else 2)", flag="twig_K", metavar="K"
    )
    T: int | None = option(None, "layers of the twig (default: from the twig's files)", flag="twig_T", metavar="T")
    wipe_layer: int | None = option(
        None, "layer before which the image is wiped when decoding, F (default: from the twig's files, else 0.75 L)",
        "--twig-F", metavar="F",
    )  # fmt: skip
    device: str | None = option(None, "cpu, cuda, cuda:N or mps (default: the best there is)")
    dtype: str | None = option(None, "float32, bfloat16 or float16 (default: what the device likes)")
    attn_implementation: str = option("sdpa", "sdpa, eager or flash_attention_2", metavar="NAME")
    revision: str | None = option(
        None, "commit, branch or tag of the base on the hub, or of the twig where only that is there", metavar="REV"
    )
    twig_revision: str | None = option(None, "commit, branch or tag of the twig on the hub", metavar="REV")
    load_8bit: bool = option(False, "round the base's decoder layers to 8 bits while they are read (needs torchao)")
    load_4bit: bool = option(False, "round them to 4 bits (needs torchao)")
    draft_8bit: bool = option(False, "round the twig's layers to 8 bits (needs torchao)")

    def __post_init__(self) -> None:
        """From here on a revision is a part of the name."""
        base, twig = pinned(self.base, self.twig, self.revision, self.twig_revision)
        for name, value in (("base", base), ("twig", twig), ("revision", None), ("twig_revision", None)):
            object.__setattr__(self, name, value)
        if self.load_8bit and self.load_4bit:
            raise InputError("load_8bit and load_4bit are both asked for; the base is rounded once: give one of them")

    @property
    def bits(self) -> int | None:
        """Of a weight in the base's decoder layers, where they are rounded."""
        return 8 if self.load_8bit else 4 if self.load_4bit else None

    @property
    def has_twig(self) -> bool:
        return self.twig is not None or self.base is None


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer comes about: the options of `TwigVLM.generate`, said here and nowhere else.

    The defaults are the paper's (greedy, drafts of 5, confidence 0.6). Raises InputError on values outside their
    range; whether a budget or a method can be is the method's business.
    """

    retained_tokens: float | None = option(
        None, "R, average of visual tokens per base layer", "-R", metavar="R", unless=64.0
    )  # None prunes nothing; with several images so many per image, shared between them by score
    pruning: str = option("twig", "how visual tokens are chosen", metavar="NAME")  # a name in twigvlm.pruning.METHODS
    query: str = option("last", "whose attention chooses: last (text token) or text (all of it, paper Eq. 3)")
    draft_length: int | Literal["auto"] = option(
        5, "drafted tokens per step at most; auto: as many as pay on this machine", parse=whole_or_auto, metavar="N"
    )  # delta; 0, or no twig, is plain decoding
    draft_confidence: float = option(0.6, "drafting stops after a token less probable than this", metavar="X")  # theta
    tree: str | Sequence[int] | None = option(
        None, "drafts that branch instead of chains: E,W,D,N (children of a node, nodes of a level that have children, levels, nodes "
        "verified), or auto: as wide and deep as pays on this machine", parse=str, metavar="E,W,D,N",
    )  # fmt: skip
    max_new_tokens: int | Sequence[int] = option(512, "longest answer", parse=int, metavar="N")  # or one a row
    do_sample: bool = False
    temperature: float = option(1.0, "sample at this temperature; 0 is greedy", metavar="X", unless=0.0)
    top_k: int | None = option(None, "sample from the N likeliest tokens (default: all)", metavar="N")
    top_p: float | None = option(None, "sample from the likeliest tokens that make up P (default: all)", metavar="P")
    seed: int | Sequence[int] | None = option(  # of the first row, or one a row
        None, "of sampling and of random pruning; makes them repeatable", parse=int, metavar="N"
    )
    traced: bool = False  # for who draws the road: scores of visual tokens, times and probabilities

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, legal: str) -> None:
            if not ok:
                raise InputError(f"{name} is {getattr(self, name)!r}; {legal}")

        length = 0 if self.draft_length == AUTO else self.draft_length
        check(_whole(length) and length >= 0, "draft_length", "0 (plain decoding) or more, or 'auto', is needed")
        check(0 <= self.draft_confidence <= 1, "draft_confidence", "0 to 1 is needed")
        self._check_tree()
        limits = self.max_new_tokens if isinstance(self.max_new_tokens, Sequence) else [self.max_new_tokens]
        check(all(_whole(n) and n >= 1 for n in limits), "max_new_tokens", "1 or more is needed")
        good = math.isfinite(self.temperature) and self.temperature > 0
        check(good, "temperature", "a number above 0 is needed (for greedy decoding do not sample)")
        seeds = self.seed if isinstance(self.seed, Sequence) else [self.seed]
        check(all(s is None or _whole(s) for s in seeds), "seed", "a whole number, one a row, or None is needed")
        check(self.top_k is None or (_whole(self.top_k) and self.top_k >= 1), "top_k", "1 or more is needed")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", "above 0 and at most 1 is needed")

    def _check_tree(self) -> None:
        """One way to write a tree; what it says of drafts is not said otherwise as well."""
        if self.tree is None:
            return
        if self.tree != AUTO:
            object.__setattr__(self, "tree", str(tree_shape(self.tree)))
        usual = {f.name: f.default for f in fields(self)}
        chains = self.shape is not None and self.shape.E == 1
        for name, why in (
            ("draft_length", "says how deep drafts are"),
            ("draft_confidence", "weighs whole paths instead"),
        ):
            value = getattr(self, name)
            off = name == "draft_length" and value == 0  # drafts nothing, whatever a draft would be
            if value != usual[name] and not off and not (chains and name == "draft_confidence"):
                raise InputError(f"tree is {self.tree}, which {why}, and {name} is {value!r}; leave one of them away")

    @property
    def shape(self) -> TreeShape | None:
        """Of drafts that branch; None for chains, and where the machine chooses."""
        return None if self.tree in (None, AUTO) else tree_shape(self.tree)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def takes(settings: type) -> Callable:
    """Show the fields of a dataclass, which a function takes as `**options`, in its signature."""

    def shown(function: Callable) -> Callable:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        made = [inspect.Parameter(f.name, own[-1].kind, default=f.default, annotation=f.type) for f in fields(settings)]
        function.__signature__ = signature.replace(parameters=[*own, *made])
        return function

    return shown
