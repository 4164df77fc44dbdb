"""The card of what is shared: the README.md whose head the hub reads. Made and read back by huggingface_hub's own classes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import hub_id
from ..errors import InputError
from .upload import EMBEDDED

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

CARD = "README.md"
TAGS = ("llava", "token-pruning", "speculative-decoding")
TASK = "image-text-to-text"
LICENSE = re.compile(r"[a-z0-9]+([.+-][a-z0-9.+]+)*")  # how the hub writes one: apache-2.0, cc-by-nc-4.0, llama2, other
HEAD = re.compile(r"\s*---\r?\n")  # how a card with a head begins
LICENSE_FIELDS = ("license", "license_name", "license_link")
# Data files whose home on the hub is known, by the name that they have there.
HOMES = {
    "llava_v1_5_mix665k.json": "liuhaotian/LLaVA-Instruct-150K",
    "llava_instruct_150k.json": "liuhaotian/LLaVA-Instruct-150K",
    "blip_laion_cc_sbu_558k.json": "liuhaotian/LLaVA-Pretrain",
}


@dataclass(frozen=True)
class About:
    """What a card's head says: of which base (`folder` holds its files), under which licence, from which data, how good.

    `relation` is the hub's word for what it is to its base; a base that is not on the hub is not named in the head.
    """

    name: str
    base: str | None = None
    folder: Path | None = None
    license: str | None = None  # None: the base's
    datasets: Sequence[str] = ()
    results: Sequence[EvalResult] = ()
    relation: str = "adapter"
    library: str = "twigvlm"
    tags: Sequence[str] = TAGS

    def head(self) -> ModelCardData:
        """Raises InputError for a licence or a data set that the hub cannot know."""
        from huggingface_hub import ModelCardData

        base = hub_id(self.base)
        more = {"base_model": base, "base_model_relation": self.relation} if base else {}
        for name in self.datasets:
            _check_dataset(name)
        return ModelCardData(
            **more,
            **license_of(self.folder, base, self.license),
            library_name=self.library,
            pipeline_tag=TASK,
            tags=list(self.tags),
            datasets=list(self.datasets) or None,
            model_name=self.name if self.results else None,
            eval_results=list(self.results) or None,
        )


def license_of(folder: Path | None, base: str | None, asked: str | None = None) -> dict[str, str]:
    """The licence's fields of a head: as asked, else as the base's own card says, else `other`, which points at the base."""
    if asked is not None:
        if not LICENSE.fullmatch(asked):
            raise InputError(
                f"license is {asked!r}; an identifier of the hub is needed, in small letters: apache-2.0, llama2, other"
            )
        return {"license": asked}
    said = read_head(folder / CARD) if folder is not None and (folder / CARD).is_file() else {}
    found = {name: said[name] for name in LICENSE_FIELDS if isinstance(said.get(name), str)}
    if "license" in found and LICENSE.fullmatch(found["license"]):
        return found
    where = {"license_link": f"https://huggingface.co/{base}"} if base else {}
    return {"license": "other", "license_name": "license-of-the-base", **where}


def read_head(file: Path) -> dict[str, Any]:
    """The fields of a card's head; nothing where there is none that can be read."""
    from huggingface_hub import ModelCard

    try:
        text = file.read_text(encoding="utf-8")
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict() if HEAD.match(text) else {}
    except Exception:  # somebody else's file: yaml and the parser of its head raise what they like
        return {}


def with_head(text: str, about: About) -> str:
    """A card of this text below a head of these facts; what a head of the text says besides stays there.

    Raises InputError for a head that the hub's own reader cannot read back.
    """
    from huggingface_hub import ModelCard

    head, said, body = about.head().to_dict(), {}, text
    if HEAD.match(text):
        try:
            old = ModelCard(text, ignore_metadata_errors=True)
        except Exception as fault:  # yaml raises what it likes
            raise InputError(f"{CARD}: its head cannot be read ({_line(fault)}); mend or remove it") from fault
        said, body = old.data.to_dict(), old.text
    if about.license is None and "license" in said:  # somebody decided it
        head = {name: value for name, value in head.items() if name not in LICENSE_FIELDS}
    card = f"---\n{_yaml({**said, **head})}\n---\n{body.lstrip()}"
    check(card)
    return card


def check(text: str) -> None:
    """Raises InputError unless the hub's own classes read this card, and read again what they then write."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
        again = ModelCard(str(card))
    except Exception as fault:
        raise InputError(f"{CARD}: its head cannot be read ({_line(fault)}); mend it") from fault
    if not card.data.to_dict() or again.data.to_dict() != card.data.to_dict():
        raise InputError(
            f"{CARD}: its head is empty or does not survive being read; YAML between two lines of --- is needed"
        )


def result(facts: Mapping[str, Any]) -> EvalResult:
    """A result.json of `twigvlm eval`, as the hub's leaderboards read one. Raises InputError for what is none."""
    from huggingface_hub import EvalResult

    texts, R = ("task", "title", "split", "metric"), facts.get("R")
    wrong = [name for name in texts if not isinstance(facts.get(name), str)]
    wrong += ["score"] * (not _is_number(facts.get("score"))) + ["R"] * (R is not None and not _is_number(R))
    if wrong:
        raise InputError(
            f"no result of twigvlm eval: {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} missing or of another kind; "
            "texts are needed, and numbers as score and R"
        )
    how = "unpruned" if R is None else f"{facts.get('method', 'pruned')}, R = {R:g}"
    part = f", {facts['questions']} questions" if facts.get("partial") else ""
    return EvalResult(
        task_type=TASK,
        dataset_type=facts["task"],
        dataset_name=f"{facts['title']} ({how}{part})",
        dataset_split=facts["split"],
        metric_type="accuracy",
        metric_name=facts["metric"],
        metric_value=round(float(facts["score"]), 4),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def agreement(value: float, against: str, data: str) -> EvalResult:
    """How often a twig's most probable token is the right one, percent."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type=TASK, dataset_type=hub_id(HOMES.get(data)) or "held-out", dataset_name=f"{data}, held out",
        metric_type="accuracy", metric_name=f"agreement with {against}, %", metric_value=round(value, 4),
    )  # fmt: skip


def _check_dataset(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as fault:
        raise InputError(
            f"dataset is {name!r}; the id of one on the hub is needed, owner/name ({_line(fault)})"
        ) from fault


def _yaml(facts: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True, width=1000).rstrip()


def _line(fault: Exception) -> str:
    return " ".join(str(fault).split())[:200] or type(fault).__name__


TWIG = """
# Twig of {base} (K = {K}, T = {T})

A twig for [TwigVLM](https://arxiv.org/abs/2503.14075): {T} decoder layers, a norm and a head that grow on layer {K} of the
frozen base, prune its visual tokens and draft its words. What it says is decided by that base, which verifies every word.

```python
import twigvlm

vlm = twigvlm.load({load})
print(vlm.answer("picture.jpg", "Describe the image in detail.", retained_tokens=64))
```

| | |
|---|---|
{table}

The weights are safetensors; nothing of this folder is run when it is loaded.
"""


def twig_text(facts: Mapping[str, Any], repository: str) -> str:
    """The text of a twig's card, by its description."""
    base, revision = facts["base"], facts.get("base_revision")
    pinned = f', revision="{revision}"' if revision else ""
    load = f'"{base if hub_id(base) else "FOLDER OF THE BASE"}", "{repository}"{pinned}'
    if base == EMBEDDED:
        load = f'twig="{repository}"'
    rows = {
        "Base": f"`{base}`" + (f" at revision `{revision}`" if revision else ""),
        "Layers": f"{facts['T']} on layer {facts['K']} of {facts['L']}; the image is wiped before layer {facts['F']}",
        "Width": f"{facts['hidden_size']}, {facts['vocabulary']} words",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return TWIG.format(base=base, K=facts["K"], T=facts["T"], load=load, table=table)
