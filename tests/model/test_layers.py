"""Decoder layers of any supported transformers are called by the names that they know."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import IMAGE, ROOT, one, tiny
from torch import nn

from twigvlm.errors import RunError
from twigvlm.model.cache import CacheGroup
from twigvlm.model.trunk import cache_argument, through


class Old(nn.Module):
    """As up to transformers 5.23."""

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, position_embeddings=None, **rest):
        return past_key_values, rest


class New(nn.Module):
    """As from transformers 5.24 on: the old name is taken too, with a warning."""

    def forward(self, hidden_states, attention_mask=None, cache=None, position_embeddings=None, **rest):
        return cache, rest


class Wrapped(New):
    """As a decorator leaves it: the signature is that of the wrapped function."""

    @functools.wraps(New.forward)
    def forward(self, *args, **rest):
        return New.forward(self, *args, **rest)


class Foreign(nn.Module):
    def forward(self, hidden_states, attention_mask=None, memory=None, position_embeddings=None, **rest):
        return memory, rest


@pytest.mark.parametrize("kind", [Old, New, Wrapped])
def test_each_generation_of_layers_gets_its_cache(kind):
    cache = CacheGroup([0], 1)
    assert through(kind(), torch.zeros(1, 1, 4), None, None, cache) == (cache, {})


def test_a_layer_that_would_forget_is_refused():
    with pytest.raises(RunError, match=r"Foreign\.forward takes a cache neither as `cache` nor as"):
        through(Foreign(), torch.zeros(1, 1, 4), None, None, None)


def test_the_name_is_looked_up_once_per_class():
    class Fresh(New):
        pass

    before = cache_argument.cache_info().misses
    for _ in range(3):
        through(Fresh(), torch.zeros(1, 1, 4), None, None, None)
    assert cache_argument.cache_info().misses == before + 1


@pytest.mark.parametrize("remembered", [True, False])
def test_installed_layers_are_called_without_a_warning(remembered):
    vlm = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if remembered:
            vlm.generate(**one(vlm, 3, IMAGE, 4), max_new_tokens=6, retained_tokens=2.5)
        else:  # as in training
            arguments = one(vlm, 3, IMAGE, 4)
            ids = arguments["input_ids"]
            stream = vlm.trunk.embed(ids, [ids.shape[1]], arguments["pixel_values"])
            vlm.trunk.run(vlm.trunk.layers, stream, None)


@pytest.mark.slow
def test_an_answer_comes_without_a_warning():
    """In a process of its own: what is said on import or while loading counts too."""
    question = ("--question", "Is there a circle?")
    command = [sys.executable, "-W", "always::FutureWarning", "cli_demo.py", *question]
    out = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, encoding="utf-8", timeout=300)
    assert out.returncode == 0 and not out.stderr, out.stderr
