"""The twig: T decoder layers, a norm and a head that continue layer K's hidden states (paper section 3.1).

On disk: a folder with `model.safetensors` (`lm_head.weight`, `model.norm.weight`,
`model.layers.{0..T-1}.*`, with a pruning head `leaf_attention_module.{q,k}_gate.weight`: the release's names)
and `twig_config.json` (K, T, F, L, the base, shapes, format version). The bare release file, which stores no K,
is read as well.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from ..config import FORMAT_VERSION, TwigConfig, hub_id, split_name
from ..errors import InputError
from ..files import copy as copy_file
from ..files import replacing, write_text
from ..hub.card import CARD, About, twig_text, with_head
from ..hub.upload import check_base, check_name, upload
from .packed import PackedLinear, sample, unpack
from .pruning_head import NAME as HEAD
from .pruning_head import PruningHead, head_for
from .skinny import quick
from .trunk import Trunk

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

WEIGHTS, CONFIG = "model.safetensors", "twig_config.json"
PICTURE = "curve.png"  # of the training, which its card shows
START = "pruning_head"  # how the pruning head began, in the description and in the metadata of the weights
TUNED = "tower_pruning"  # the method before the decoder that the twig learnt behind, in the description
Init = Literal["base", "last", "random"]


@dataclass(frozen=True)
class Origin:
    """What a twig grew on: the base's name, its commit on the hub (None elsewhere), its signature, the folders of both."""

    base: str
    revision: str | None
    signature: list[float]
    base_folder: Path | None = None
    folder: Path | None = None  # that the twig was read from


class Twig(nn.Module):
    """Fresh twigs come from `grow`, stored ones from `loading.twig`."""

    origin: Origin | None = None  # known once it was loaded with its base

    def __init__(self, config: TwigConfig, layers: nn.ModuleList, norm: nn.Module, lm_head: nn.Linear):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.layers = layers
        self.model.norm = norm
        self.lm_head = lm_head
        for i, layer in enumerate(layers):
            layer.self_attn.layer_idx = config.L + i  # its own cache slots, behind the base's
        if config.pruning_head:
            self.add_module(HEAD, head_for(layers[-1].self_attn, config.pruning_head))

    @property
    def pruning_head(self) -> PruningHead | None:
        return getattr(self, HEAD, None)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] that left the last twig layer → fp32 [..., vocabulary]."""
        with quick([self.lm_head], fewest=1):
            return self.lm_head(self.model.norm(hidden)).float()

    def save(
        self,
        folder: str | Path,
        *,
        base_model: str | None = None,
        dtype: torch.dtype | None = None,
        name: str | None = None,
        **about: Any,
    ) -> Path:
        """Write weights, description and card to a folder, as `push` shares them.

        `base_model` is the base's id on the hub, where it was loaded from a folder; `dtype` that of the stored weights;
        `name` is that of the repository, for the card; `about` are `license`, `datasets` and `results` of
        `twigvlm.hub.card.About`. Raises InputError for a twig that does not know its base.
        """
        if self.origin is None:
            raise InputError("this twig does not know its base; load both: twigvlm.load(BASE, TWIG).twig")
        origin, folder = self.origin, Path(folder)
        if base_model is not None and hub_id(base_model) is None:
            raise InputError(f"base_model is {base_model!r}; the base's id on the hub is needed, owner/name")
        named, said = split_name(base_model)
        facts = describe(self, named or origin.base, origin.signature, said or origin.revision)
        about = About(name or folder.name, facts["base"], origin.base_folder, **about)
        text = _text(origin.folder) or twig_text(facts, name or "THIS FOLDER")
        card = with_head(text, about)
        write_twig(folder, stored_state(self, dtype), facts)
        write_text(card, folder / CARD)
        if origin.folder is not None and PICTURE in text and (origin.folder / PICTURE).is_file():
            copy_file(origin.folder / PICTURE, folder / PICTURE)
        return folder

    def push(
        self,
        repository: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **saving: Any,
    ) -> CommitInfo:
        """Share this twig on the hub as `repository` (owner/name): one commit, whose `oid` is a revision for `twigvlm.load`.

        The repository is made where there is none, `private` if you say so; `revision` is a branch; `create_pr` proposes
        the commit to whom the repository belongs; `token` as `huggingface_hub` takes it. `saving` are options of `save`.
        Raises InputError for what cannot be and where the hub refuses, RunError where it cannot be reached.
        """
        check_name(repository)
        if self.origin is not None and saving.get("base_model") is None:
            check_base(self.origin.base, 'give base_model="owner/name"')
        with tempfile.TemporaryDirectory() as place:
            folder = self.save(place, **{"name": repository, **saving})
            return upload(
                folder, repository, private=private, token=token, commit_message=commit_message, revision=revision,
                create_pr=create_pr,
            )  # fmt: skip


def grow(trunk: Trunk, config: TwigConfig, init: Init = "base", copied: Sequence[nn.Module] | None = None) -> Twig:
    """A twig with the weights of base layers K..K+T-1 ("base"), of the last T ("last"), or random ones.

    Nothing is shared with the base. Of a base in 8 or 4 bits it has the rounded weights in whole numbers of the base's type. `copied` are these layers, where the trunk has them at other places.
    Source: paper section 3.1 and its ablation of the initialisation.
    """
    first = config.L - config.T if init == "last" else config.K
    copied = trunk.layers[first : first + config.T] if copied is None else copied
    text = trunk.decoder.config  # shared, not copied: one place says which attention is used
    layers = nn.ModuleList(unpack(copy.deepcopy(layer, {id(text): text}), trunk.dtype) for layer in copied)
    twig = Twig(config, layers, copy.deepcopy(trunk.decoder.norm), copy.deepcopy(trunk.model.lm_head))
    if twig.pruning_head is not None:
        like = layers[-1].self_attn.q_proj.weight
        twig.pruning_head.to(like.device, like.dtype)
    if init == "random":
        randomise(twig, trunk.model.config.text_config.initializer_range)
    return twig


def randomise(twig: Twig, std: float) -> None:
    """Fresh weights for every matrix, the language head included; the norms stay (paper's ablation of the initialisation)."""
    for module in (*twig.layers.modules(), twig.lm_head):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)


def twig_skeleton(trunk: Trunk, config: TwigConfig, vocabulary: int) -> Twig:
    """A twig of the right shapes on the meta device, to be filled from a file."""
    like = trunk.model.config.text_config
    with torch.device("meta"):
        kind = type(trunk.layers[0])
        text = trunk.decoder.config  # shared: one place says which attention is used
        layers = nn.ModuleList(kind(text, config.L + i) for i in range(config.T))
        norm = type(trunk.decoder.norm)(like.hidden_size, eps=like.rms_norm_eps)
        return Twig(config, layers, norm, nn.Linear(like.hidden_size, vocabulary, bias=False))


def save_twig(
    twig: Twig,
    trunk: Trunk,
    folder: Path,
    base: str,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> None:
    """Write the folder format; `base` is the name of the model that it grew on, `revision` its commit on the hub."""
    write_twig(folder, stored_state(twig, dtype), describe(twig, base, signature(trunk), revision))


def stored_state(twig: Twig, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The weights on the CPU, each a tensor of its own."""
    return {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in twig.state_dict().items()}


def _text(folder: Path | None) -> str:
    """The card that a twig came with."""
    file = None if folder is None else folder / CARD
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else ""


def describe(twig: Twig, base: str, base_signature: list[float], revision: str | None = None) -> dict:
    """What twig_config.json says. The revision behind a base's name is the one that was asked for; the commit is said."""
    name, asked = split_name(base)
    base, revision = name or base, revision or asked
    letters = {name: value for name, value in asdict(twig.config).items() if value != ""}  # most have no pruning head
    return {
        "format_version": FORMAT_VERSION,
        **letters,
        "base": base,
        **({"base_revision": revision} if revision else {}),
        "base_signature": base_signature,
        "hidden_size": twig.lm_head.in_features,
        "vocabulary": twig.lm_head.out_features,
    }


def write_twig(folder: Path, state: dict[str, torch.Tensor], facts: dict) -> None:
    """Tensors on the CPU and `describe`'s facts to a folder; each file is written whole or not at all."""
    with replacing(folder / CONFIG) as config, replacing(folder / WEIGHTS) as weights:  # the weights take place first
        config.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        # The bare file is a twig, too, and its gates are of one kind only.
        gates = {START: facts[START]} if START in facts else {}
        save_file(state, weights, metadata={"format": "pt", **gates})


def signature(trunk: Trunk) -> list[float]:
    """A few weights of the base, by which a twig knows it again under any name, layout or dtype, rounded or not."""
    return _sample(trunk.layers[0].self_attn.q_proj)


def score_signature(twig: Twig) -> list[float]:
    """A few weights of what scores visual tokens: the last layer's query projection, and the pruning head's gates."""
    head = twig.pruning_head
    linears = [twig.layers[-1].self_attn.q_proj, *((head.q_gate, head.k_gate) if head is not None else ())]
    return [number for linear in linears for number in _sample(linear)]


def _sample(linear: nn.Module) -> list[float]:
    return linear.sample if isinstance(linear, PackedLinear) else sample(linear.weight)


def recognised(known: Sequence[float], trunk: Trunk) -> bool:
    """Whether a signature is this base's."""
    return alike(known, signature(trunk))


def alike(known: Sequence[float], found: Sequence[float]) -> bool:
    """Whether two signatures are of the same weights, whatever dtype either was in. What is no list of numbers is nobody's."""
    try:
        theirs, own = (torch.tensor(numbers, dtype=torch.float64) for numbers in (known, found))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return theirs.shape == own.shape and torch.allclose(theirs, own, rtol=0.02, atol=1e-4)
