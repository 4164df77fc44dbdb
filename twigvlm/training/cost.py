"""The plan of a training: what is loaded, what learns, memory, steps and work, without reading any weight.

Parameters are counted on a model of the right shapes that has no data ("meta" device). Memory is
arithmetic, shown by part; its coefficients are checked in the tests against what autograd keeps.
Legend: D width, H feed-forward width, S tokens of a sample, V vocabulary, n devices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from ..config import STARTS, TwigConfig, split_name
from ..errors import InputError
from ..loading.describe import read_config
from ..loading.random import random_config
from ..program import print_json
from ..world.conversations import SAMPLES as DRAWN_SAMPLES
from .data.examples import Records
from .plus.cost import Base, stage_flops, stage_memory
from .run.zero import read_zero, stage_of
from .settings import ROWS_PER_DEVICE, Settings, split_batch
from .twig import Start, entering, layers_needed, reducer_of, shorten, trim_tower

STAGES = ("none", "2", "3", "3_offload")
CARDS = (24, 40, 80)  # GB, of 10**9 bytes
MIX665K = 665_298  # samples of llava_v1_5_mix665k.json
TEXT, ANSWERS = 320, 200  # tokens of a sample and learnt ones, where no data says: rough figures of that file
TURNS = 5  # answers of a sample, likewise
RESERVE = 1_000_000_000  # CUDA's own memory and what the allocator cannot use
BUCKETS = 4 * 100_000_000  # DeepSpeed's two buckets of 1e8 bf16 numbers
HALF, SINGLE = 2, 4  # bytes of bf16 and fp32
# Bytes that autograd keeps per token and layer: (times D, times H), in pure bf16 and with fp32 weights under autocast.
KEPT = {"pure": (24, 8), "autocast": (30, 8)}
LOGIT_BYTES = 14  # per answer token and word: bf16 logits, fp32 logits, their softmax and its gradient
HEAD_BYTES = 16  # per answer token and D: rows picked, their norm in fp32
PASSING = (12, 6)  # bytes per token in flight in one layer, times D and H
KNOWN_HUB = re.compile(r"llava-v?1\.5-(7|13)b(-hf)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Counts:
    """Parameters by part, and the shape that memory and work follow from."""

    L: int
    tower: int
    projector: int
    embeddings: int
    trunk: int
    layers: int  # of the twig
    norm: int
    head: int
    D: int
    H: int
    V: int
    tower_D: int
    tower_tokens: int
    tower_layers: int
    visual: int  # tokens of an image in layer 0
    patches: int  # and without anything cut before it
    above: int = 0  # of the base above layer K, its norm and head: 0 where nobody asks them
    pruning_head: int = 0
    alone: bool = False  # the pruning head learns and nothing else

    @property
    def twig(self) -> int:
        return self.layers + self.norm + self.head

    @property
    def trainable(self) -> int:
        return self.pruning_head + (0 if self.alone else self.twig)

    @property
    def frozen(self) -> int:
        below = self.tower + self.projector + self.embeddings + self.trunk
        return below + self.above + (self.twig if self.alone else 0)


def find_config(settings: Settings) -> LlavaConfig:
    """Of the base, from its config.json, or from its name where it is LLaVA-1.5. Reads no weights."""
    if settings.random is not None:
        return random_config(settings.random)
    name = split_name(settings.base)[0] or settings.base
    known = KNOWN_HUB.search(str(name).rstrip("/")) if name is not None else None
    if known and not Path(name).expanduser().exists():
        config = random_config(f"llava-1.5-{known[1]}b")
        if not known[2]:  # the original's vocabulary is not padded
            config.text_config.vocab_size = 32000
        return config
    return read_config(settings.base)[1]


def build_meta(config: LlavaConfig, twig: TwigConfig, init: str, whole: bool = False) -> tuple:
    """(trunk, twig) of the right shapes without data, as `prepare_twig` would leave them."""
    from ..families import trunk_of
    from ..model.twig import grow

    config.text_config.num_hidden_layers = twig.L if whole else len(layers_needed(twig, init))
    with torch.device("meta"):
        trunk = trunk_of(LlavaForConditionalGeneration(config))
        grown = grow(trunk, twig, copied=trunk.layers[-twig.T :])
    if not whole:
        shorten(trunk, twig.K)
    trim_tower(trunk)
    return trunk, grown


def count(settings: Settings) -> Counts:
    """Raises InputError for an impossible K, T or F."""
    config = find_config(settings)
    text, vision = config.text_config, config.vision_config
    L = text.num_hidden_layers
    start, letters = Start(settings.K, settings.T, settings.F, settings.init), letters_of(settings, L)
    trunk, twig = build_meta(config, letters, start.init, whole=settings.stage > 0)
    reducer_of(settings.tower_pruning, letters, trunk.V)

    def size(module) -> int:
        return sum(p.numel() for p in module.parameters())

    tower = trunk.model.model.vision_tower
    return Counts(
        L=L,
        tower=size(tower),
        projector=size(trunk.model.model.multi_modal_projector),
        embeddings=size(trunk.decoder.embed_tokens),
        trunk=size(trunk.layers[: letters.K]),
        layers=size(twig.layers),
        norm=size(twig.model.norm),
        head=size(twig.lm_head),
        D=text.hidden_size,
        H=text.intermediate_size,
        V=twig.lm_head.out_features,
        tower_D=vision.hidden_size,
        tower_tokens=trunk.V + (config.vision_feature_select_strategy == "default"),
        tower_layers=len(tower.encoder.layers),
        visual=entering(settings) or trunk.V,
        patches=trunk.V,
        above=size(trunk.layers[letters.K :]) + size(trunk.decoder.norm) + size(trunk.model.lm_head)
        if settings.stage
        else 0,
        pruning_head=size(twig.pruning_head) if settings.stage else 0,
        alone=settings.stage == 2,
    )


def letters_of(settings: Settings, L: int) -> TwigConfig:
    return TwigConfig(
        L, settings.K, settings.T, settings.F, (settings.head_init or STARTS[0]) if settings.stage else ""
    )


def staged(counts: Counts, settings: Settings) -> Base:
    """What TwigVLM++'s stages are planned with."""
    layer, letters = counts.layers // settings.T, letters_of(settings, counts.L)
    return Base(layer, counts.head, counts.pruning_head, counts.D, counts.H, counts.V, counts.visual, letters)


def fixed_memory(counts: Counts, stage: str, devices: int) -> dict[str, int]:
    """Bytes on each device that do not depend on the batch, by part."""
    P, n = counts.trainable, devices
    parts = {"frozen (bf16)": HALF * counts.frozen}
    if stage == "none":
        parts |= {"twig (fp32)": SINGLE * P, "its bf16 copies": HALF * P, "gradients (fp32)": SINGLE * P}
        parts |= {"Adam (fp32)": 2 * SINGLE * P}
        parts |= {"DDP buckets": SINGLE * P} if n > 1 else {}
    elif stage == "2":
        parts |= {"twig (bf16)": HALF * P, "gradients (bf16)": HALF * P // n, "gradients (fp32)": SINGLE * P // n}
        parts |= {"master weights and Adam (fp32)": 3 * SINGLE * P // n, "buckets": BUCKETS}
    else:
        gathered = HALF * max(counts.head, counts.layers // max(1, _twig_layers(counts)) * 2)
        parts |= {"gathered layers (bf16)": min(HALF * P, gathered), "buckets": BUCKETS}
        if stage == "3":
            parts |= {
                "twig (bf16)": HALF * P // n,
                "gradients (bf16)": HALF * P // n,
                "gradients (fp32)": SINGLE * P // n,
            }
            parts |= {"master weights and Adam (fp32)": 3 * SINGLE * P // n}
    return parts | {"reserve": RESERVE}


def _twig_layers(counts: Counts) -> int:
    """T, from what a layer of this shape has."""
    return max(1, round(counts.layers / (4 * counts.D**2 + 3 * counts.D * counts.H)))


def host_memory(counts: Counts, stage: str, devices: int) -> int:
    """Bytes in the machine's own memory, for each device."""
    return (HALF + HALF + SINGLE + 3 * SINGLE) * counts.trainable // devices if stage == "3_offload" else 0


def kept_by_layer(D: int, H: int, stage: str) -> int:
    """Bytes per token that autograd keeps for one twig layer."""
    per_D, per_H = KEPT["autocast" if stage == "none" else "pure"]
    return per_D * D + per_H * H


def sample_memory(counts: Counts, T: int, tokens: int, answers: int, stage: str, checkpointed: bool) -> int:
    """Bytes for one sample of a micro-batch at the peak: what autograd keeps, the logits, one layer in flight."""
    layer = tokens * kept_by_layer(counts.D, counts.H, stage)
    kept = layer + tokens * T * HALF * counts.D if checkpointed else T * layer
    kept += answers * (LOGIT_BYTES * counts.V + HEAD_BYTES * counts.D)
    return kept + tokens * (PASSING[0] * counts.D + PASSING[1] * counts.H)


def flops(counts: Counts, K: int, T: int, tokens: int, answers: int, checkpointed: bool) -> dict[str, int]:
    """Floating-point operations for one sample: a multiply-add is two, a backward pass twice a forward pass."""

    def layers(number: int, parameters: int) -> int:
        return 2 * parameters * tokens + number * 2 * tokens * tokens * counts.D  # causal: half of the square

    seen = counts.tower_tokens
    tower = 2 * counts.tower * seen + counts.tower_layers * 4 * seen * seen * counts.tower_D
    forward = layers(T, counts.layers) + 2 * counts.head * answers
    return {
        "tower": tower + 2 * counts.projector * counts.visual,
        "trunk": layers(K, counts.trunk),
        "twig": forward * (4 if checkpointed else 3),
    }


def make_plan(settings: Settings, devices: int | None = None, samples: int | None = None) -> dict:
    """Everything that `print_plan` prints, as one dictionary; bytes and numbers, no text."""
    counts = count(settings)
    kind = settings.device or ("cpu" if settings.embedded else "cuda")
    devices = devices or _devices(kind)
    zero = settings.zero_config(kind, devices)
    stage = _stage(settings, zero)
    rows, accumulation = split_batch(settings.batch_size, devices, settings.per_device_batch, ROWS_PER_DEVICE[kind])
    samples = _samples(settings) if samples is None else samples
    steps = settings.max_steps or -(-round(settings.epochs * samples) // settings.batch_size)
    tokens, answers = min(settings.max_length, counts.visual + TEXT), ANSWERS
    longest = settings.max_length
    most = max(answers, longest // 4)

    def per_sample(which: str) -> int:
        own = stage_memory(staged(counts, settings), settings, longest, most) if settings.stage else 0
        if settings.stage == 2:  # nothing else keeps anything for a backward pass
            return own
        return own + sample_memory(counts, settings.T, longest, most, which, settings.gradient_checkpointing)

    memory = {}
    for which in STAGES:
        fixed = sum(fixed_memory(counts, which, devices).values())
        memory[which] = {
            "fixed_bytes": fixed,
            "per_sample_bytes": per_sample(which),
            "total_bytes": fixed + rows * per_sample(which),
            "host_bytes": host_memory(counts, which, devices),
            "largest_batch": {str(gb): max(0, (gb * 10**9 - fixed) // per_sample(which)) for gb in CARDS},
        }
    work = _work(counts, settings, tokens, answers)
    return {
        "base": settings.base or settings.random or "sprout",
        "K": settings.K, "T": settings.T, "L": counts.L,
        "layers_loaded": list(range(counts.L)) if settings.stage else layers_needed(letters_of(settings, counts.L), settings.init),
        "parameters": {
            "tower": counts.tower, "projector": counts.projector, "embeddings": counts.embeddings, "trunk": counts.trunk,
            "twig_layers": counts.layers, "norm": counts.norm, "head": counts.head,
        } | ({"above": counts.above, "pruning_head": counts.pruning_head} if settings.stage else {}),
        "trainable_parameters": counts.trainable, "frozen_parameters": counts.frozen,
        "devices": devices, "device": kind, "zero": stage,
        "batch_size": settings.batch_size, "per_device_batch": rows, "accumulation": accumulation,
        "samples": samples, "epochs": settings.epochs, "steps": steps,
        "max_length": longest, "visual_tokens": counts.visual, "tower_pruning": settings.tower_pruning, "memory_parts": fixed_memory(counts, stage, devices), "memory": memory,
        "memory_bytes_per_device": memory[stage]["total_bytes"],
        "largest_batch": memory[stage]["largest_batch"],
        "fits_24_gb": {which: memory[which]["largest_batch"]["24"] >= 1 for which in STAGES},
        "tokens_per_sample": tokens, "answers_per_sample": answers,
        "feature_cache": {
            "bytes": HALF * counts.D * tokens * samples, "saved_share_of_a_later_pass": (work["tower"] + work["trunk"]) / sum(work.values())
        },
        "flops_per_sample": work, "flops_total": sum(work.values()) * steps * settings.batch_size,
        "on_policy": _answering(counts, settings, samples, answers) if settings.on_policy else None,
        # In stage 2 the twig lies beside what learns, so that a checkpoint can be loaded.
        "checkpoint_bytes": (3 * SINGLE + HALF * (stage != "none")) * counts.trainable + SINGLE * counts.alone * counts.twig,
    }  # fmt: skip


def _work(counts: Counts, settings: Settings, tokens: int, answers: int) -> dict[str, int]:
    work = flops(counts, settings.K, settings.T, tokens, answers, settings.gradient_checkpointing)
    if settings.stage:
        work["twig"] //= 3 + settings.gradient_checkpointing if settings.stage == 2 else 1  # forward alone
        work |= stage_flops(staged(counts, settings), settings, tokens, answers)
    return work


def _samples(settings: Settings) -> int:
    """Of the data that these settings name; in stage 2 of those with pictures, the only ones that it is about.

    Raises InputError where a file has none.
    """
    if not settings.data:
        return DRAWN_SAMPLES["train"] if settings.embedded else MIX665K
    records = Records(settings.data)
    if settings.stage < 2:
        return len(records)
    shown = sum(isinstance(one, dict) and bool(one.get("image") or one.get("images")) for one in records)
    if not shown:
        raise InputError(
            f"{settings.data}: none of {len(records):,} samples has a picture; stage 2 is about nothing else"
        )
    return shown


def _answering(counts: Counts, settings: Settings, samples: int, answers: int) -> dict:
    """What the base's own answers cost before the training: between one pass over each conversation, where the base would say what
    the data say, and a prompt and a forward a word for each turn.
    """
    if settings.on_policy > samples:
        raise InputError(
            f"on_policy is {settings.on_policy}, but there are {samples} samples; choose {samples} or less"
        )
    layer, L, tokens = counts.layers // settings.T, counts.L, min(settings.max_length, counts.patches + TEXT)
    tower = flops(counts, 0, 0, tokens, 0, False)["tower"]

    def through(new: int, behind: int = 0) -> int:
        return L * (2 * layer * new + 4 * counts.D * (new * behind + new * new // 2))

    said = 2 * counts.head * answers
    least = tower + through(tokens) + said
    most = (
        TURNS * (tower + through(tokens))
        + through(answers, tokens)
        + said
        + (0 if settings.on_policy_temperature else least)
    )
    kept = HALF * 2 * counts.D * L * (settings.max_length)  # keys and values of a conversation
    weights = HALF * (counts.tower + counts.projector + counts.embeddings + L * layer + counts.norm + counts.head)
    return {
        "samples": settings.on_policy, "most_tokens": settings.on_policy_tokens,
        "flops_least": (least if not settings.on_policy_temperature else most) * settings.on_policy, "flops_most": most * settings.on_policy,
        "base_bytes": weights, "bytes_a_conversation": kept,
    }  # fmt: skip


def _devices(kind: str) -> int:
    return max(1, torch.cuda.device_count()) if kind == "cuda" else 1


def _stage(settings: Settings, zero: Path | None) -> str:
    """Which of STAGES a DeepSpeed file means."""
    if zero is None:
        return "none"
    config = read_zero(zero)
    facts, stage = config.get("zero_optimization", {}), str(stage_of(config))
    if stage == "3" and facts.get("offload_optimizer"):
        return "3_offload"
    return stage if stage in STAGES else "2"


def print_plan(settings: Settings, devices: int | None, samples: int | None) -> int:
    """The plan for people, and, where no terminal reads it, as JSON in the last line."""
    plan = make_plan(settings, devices, samples)
    for line in _lines(plan):
        print(line)
    print_json(plan, False)
    return 0


def _lines(plan: dict) -> list[str]:
    parts = plan["parameters"]
    below, twig = ["tower", "projector", "embeddings", "trunk"], ["twig_layers", "norm", "head"]
    below += ["above"] if "above" in parts else []
    learning = [*twig, "pruning_head"] if "above" in parts else twig
    if plan["trainable_parameters"] == parts.get("pruning_head"):
        below, learning = below + twig, ["pruning_head"]
    frozen, learnt = (
        " + ".join(f"{name.replace('_', ' ')} {_millions(parts[name])}" for name in names)
        for names in (below, learning)
    )
    work = plan["flops_per_sample"]
    lines = [
        f"{plan['base']}: K = {plan['K']}, T = {plan['T']}, {len(plan['layers_loaded'])} of {plan['L']} layers are "
        f"loaded: {', '.join(map(str, plan['layers_loaded']))}",
        f"trainable  {_millions(plan['trainable_parameters'])} parameters: {learnt}",
        f"frozen     {_millions(plan['frozen_parameters'])} parameters: {frozen}",
        f"batch      {plan['batch_size']} = {plan['devices']} x {plan['device']} x {plan['per_device_batch']} samples x "
        f"{plan['accumulation']} accumulation",
        f"steps      {plan['steps']:,} for {plan['epochs']:g} x {plan['samples']:,} samples",
        f"memory     of each device with ZeRO {plan['zero']}, in GB (samples of {plan['max_length']} tokens, the longest):",
    ]
    lines += [f"           {_giga(size):6.2f}  {name}" for name, size in plan["memory_parts"].items()]
    here = plan["memory"][plan["zero"]]
    lines += [
        f"           {_giga(plan['per_device_batch'] * here['per_sample_bytes']):6.2f}  activations of "
        f"{plan['per_device_batch']} samples x {_giga(here['per_sample_bytes']):.2f}",
        f"           {_giga(here['total_bytes']):6.2f}  together",
        "ZeRO       GB fixed  GB a sample  GB on the host  largest batch in " + ", ".join(f"{gb} GB" for gb in CARDS),
    ]
    for stage, told in plan["memory"].items():
        largest = ", ".join(str(told["largest_batch"][str(gb)]) for gb in CARDS)
        lines.append(
            f"{stage:10} {_giga(told['fixed_bytes']):8.2f}  {_giga(told['per_sample_bytes']):11.2f}  "
            f"{_giga(told['host_bytes']):14.2f}  {largest}"
        )
    lines.append(
        f"work       {sum(work.values()) / 1e12:.2f} TFLOP a sample of {plan['tokens_per_sample']} tokens: "
        + ", ".join(f"{name} {flop / 1e12:.2f}" for name, flop in work.items())
        + f"; {plan['flops_total'] / 1e18:.2f} EFLOP in all"
    )
    if plan["tower_pruning"]:
        lines.append(f"image      {plan['tower_pruning']} leaves {plan['visual_tokens']} tokens of it before layer 0")
    if told := plan["on_policy"]:
        lines.append(
            f"answers    of the whole base to {told['samples']:,} samples first: {told['flops_least'] / 1e15:,.2f} to "
            f"{told['flops_most'] / 1e15:,.2f} PFLOP ({100 * told['flops_least'] / plan['flops_total']:.0f} to "
            f"{100 * told['flops_most'] / plan['flops_total']:.0f} % of the training), {_giga(told['base_bytes']):.2f} GB of weights and "
            f"{_giga(told['bytes_a_conversation']):.2f} GB a conversation at once"
        )
    lines.append(f"disk       {_giga(plan['checkpoint_bytes']):.2f} GB a checkpoint")
    cache = plan["feature_cache"]
    lines.append(
        f"store      the trunk's states would take {_giga(cache['bytes']):,.1f} GB and save "
        f"{100 * cache['saved_share_of_a_later_pass']:.0f} % of every pass but the first; not done (benchmarks/feature_cache.py)"
    )
    return lines


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M"


def _giga(number: int) -> float:
    return number / 1e9
