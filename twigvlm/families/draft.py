"""A twig and what lies below it as one stock model: layers 0..K-1 of the base, then the twig's T, its norm and its head.

What that model says first is what the twig drafts from an unpruned prompt: logit for logit, with any program that runs
LLaVA.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from ..config import DEFAULT_K
from ..loading.base import Loaded, load_base
from ..loading.describe import EMBEDDED_TWIG, read_config
from ..loading.find import fetch_weights, resolve
from ..loading.twig import load_twig, read_twig_letters, stored_twig
from ..loading.weights import read_tensors, weight_files
from ..model.trunk import Trunk
from ..model.twig import Twig
from . import trunk_of

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(*folders: Path) -> torch.dtype:
    """The narrowest type that holds every number of these checkpoints."""
    found = None
    for folder in folders:
        files = [folder] if folder.is_file() else weight_files(folder)
        for name in {stored.dtype for file in files for stored in read_tensors(file, torch.device("cpu"))}:
            one = DTYPES.get(name) or getattr(torch, name.removeprefix("torch."))
            found = one if found is None or found == one else torch.promote_types(found, one)
    return torch.float32 if found is None or found == torch.float64 else found


def load_draft(
    base: str | Path | None,
    twig: str | Path | None,
    K: int | None = None,
    T: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[LlavaForConditionalGeneration, Loaded, Twig]:
    """(the joined model on the CPU, the base that it was cut from, the twig whose layers it shares).

    Of the base only K layers are read. `dtype` None is the narrowest that loses nothing. Raises InputError for a base
    and twig that do not belong together.
    """
    twig = EMBEDDED_TWIG if twig is None else twig
    folder, config, _ = read_config(base)
    L = config.text_config.num_hidden_layers
    facts = read_twig_letters(twig, L, config.text_config.hidden_size, K, T)
    K = facts.get("K", DEFAULT_K if K is None else K)
    if dtype is None:
        dtype = stored_dtype(fetch_weights(base, folder, "base model"), *stored_twig(resolve(twig, "twig")).files)
    loaded = load_base(base, torch.device("cpu"), dtype, "sdpa", lambda _: range(max(K, 1)))
    trunk = trunk_of(loaded.model)
    grown = load_twig(twig, trunk, K, T, None, loaded, L)
    return join(trunk, grown), loaded, grown


def join(trunk: Trunk, twig: Twig) -> LlavaForConditionalGeneration:
    """The trunk's model with the twig's layers behind the K below it, its norm and its head; the trunk is used up."""
    model, K = trunk.model, twig.config.K
    decoder, config = trunk.decoder, copy.deepcopy(model.config)
    layers = nn.ModuleList([*trunk.layers[:K], *twig.layers])
    for place, layer in enumerate(layers):
        layer.self_attn.layer_idx = place
    decoder.layers, decoder.norm, model.lm_head = layers, twig.model.norm, _head(twig.lm_head, decoder.embed_tokens)
    text = config.text_config
    text.num_hidden_layers, text.vocab_size = len(layers), decoder.embed_tokens.num_embeddings
    config.tie_word_embeddings = text.tie_word_embeddings = False  # the twig's head is its own
    model.config = config
    decoder.config = config.text_config
    return model


def _head(head: nn.Linear, embeddings: nn.Embedding) -> nn.Linear:
    """The twig's head with as many rows as there are embeddings, as stock code has it.

    Rows that it lacks belong to no word (the image token, padding): each is that of the first word, so that none is
    ever the likeliest alone.
    """
    lacking = embeddings.num_embeddings - head.out_features
    if lacking <= 0:
        return head
    with torch.no_grad():
        weight = torch.cat([head.weight, head.weight[:1].expand(lacking, -1)])
    wider = nn.Linear(head.in_features, len(weight), bias=False, device="meta")
    wider.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return wider
