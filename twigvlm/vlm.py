"""The public face: a base with its twig, what it takes and what it gives back."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from .config import DEFAULT_K, DEFAULT_T, GenerationSettings, ModelSettings, TwigConfig, pinned, takes
from .decoding import Decoder, Likelihood, Step, embed, score
from .decoding.choose import Chooser
from .decoding.drafting import Drafting
from .decoding.pace import now
from .decoding.stats import ModelConfig, Stats, measure
from .decoding.streamer import feed
from .errors import InputError
from .families import trunk_of
from .loading.base import Loaded, load_base
from .loading.clip import TextTower, load_text_tower
from .loading.describe import EMBEDDED_TWIG
from .loading.device import pick_device, pick_dtype
from .loading.quantise import check_quantisation, quantise
from .loading.twig import load_twig
from .model.finite import NotFinite, trace
from .model.twig import Twig
from .prompt.images import open_image
from .prompt.processor import pads
from .prompt.template import converse, decode
from .pruning import Plan, calibrated, find_method, plan_for
from .pruning.spec import classless

CALL_STRIDE = 2**20  # rows that a call may have before its seeds meet the next call's
SEED_SPACE = 2**63


@dataclass(frozen=True)
class Output:
    """What `generate` returns; lists have one entry per row."""

    tokens: list[list[int]]  # without the end token
    kept: list[torch.Tensor] | None  # visual tokens (0..V-1, over all images) between K and F
    steps: list[list[Step]]
    stats: Stats
    scores: list[torch.Tensor] | None = (
        None  # of the visual tokens, by the first cut's probe (`State.scores`); if `traced`
    )


class TwigVLM:
    """A base VLM, frozen, and perhaps its twig. Make it with `twigvlm.load`."""

    def __init__(self, loaded: Loaded, twig: Twig | None, fallback: TwigConfig | None = None):
        self.trunk, self.twig = trunk_of(loaded.model), twig
        self.model = loaded.model
        self.base_name = loaded.name
        self._loaded, self._fallback = loaded, fallback
        self._calls = 0
        self._drafting = Drafting(self.trunk, twig)
        twig_config = twig.config if twig else None
        letters = (twig_config.K, twig_config.T, twig_config.F) if twig_config else (None, None, None)
        self.config = ModelConfig(self.trunk.L, self.trunk.V, *letters)

    @cached_property
    def processor(self):
        """A Hugging Face LlavaProcessor: pads pictures to a square, writes V image tokens per picture.

        Its `apply_chat_template` is the checkpoint's, or vicuna_v1 where LLaVA-1.5 brings none.
        """
        found = self._loaded
        return self.trunk.family.processor(found.model.config, found.folder, found.original)

    @cached_property
    def prompts(self):
        """How this model is asked: `ids` of a `prompt.template.Talk`, and of the `continuation` of an answer."""
        return self.trunk.family.prompts(self.processor, self.model.config)

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def image_token_id(self) -> int:
        return self.trunk.image_token_id

    @property
    def pads(self) -> bool:
        """Pictures are padded to a square; otherwise their middle is cut out."""
        return pads(self.model.config)

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    @property
    def dtype(self) -> torch.dtype:
        return self.trunk.dtype

    @takes(GenerationSettings)
    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        streamer=None,
        logits_processor: Sequence | None = None,
        stopping_criteria: Sequence | Callable | None = None,
        chooser: Callable | None = None,
        **options,
    ) -> Output:
        """Write answers to a batch of prompts.

        input_ids [B, S] hold `image_token_id` V times per image; pixel_values [images, 3, h, w] follow
        the order of the image tokens; attention_mask [B, S] (0 = padding, on either side) is needed
        when rows differ in length. `options` are the fields of `config.GenerationSettings`:
        `retained_tokens` is R, the average of visual tokens per base layer (None prunes nothing; with several
        images, r per image, shared between them by score); `pruning` a name in twigvlm.pruning.METHODS;
        `query` "last" or "text" (paper Eq. 3); `draft_length` 0, or no twig, is plain decoding, "auto" drafts as
        many tokens as pay on this machine (measured at the first call); `tree` (E, W, D, N) drafts trees instead of chains
        (`decoding.tree`), "auto" as wide and deep ones as pay; `seed` repeats an answer: sampling and
        random pruning draw from it, row b from seed + b, or from the b-th of a list; random pruning draws from the
        row's pictures too, and without a seed from the number of this call; `traced` notes what a picture of the road
        needs (`Output.scores`, `Step.seconds`, `Step.believed`), which synchronises the device twice a round; and draft_confidence,
        max_new_tokens (one number, or one a row), do_sample, temperature, top_k, top_p. `eos_token_id` None means the
        generation config's. `streamer` is one for one row, or a list with one a row. Stopping criteria are asked after
        every token of a row; one that has a parameter `row` is told which, and finds the ids on the host. The prompt
        and the answer share the context: an answer ends where it is full.

        `chooser` replaces twigvlm.decoding.choose.Chooser, which accepts and samples tokens.

        Raises InputError for impossible arguments, before anything is computed, and RunError where
        logits are not finite, naming the layer that they come from.
        """
        settings = GenerationSettings(**options)
        ids = self._rows(input_ids, attention_mask)
        plan = self._plan(settings.pruning, settings.retained_tokens, settings.query)
        self._check_bare(plan, ids)
        streamers = self._streamers(streamer, len(ids))
        if isinstance(settings.max_new_tokens, Sequence) and len(settings.max_new_tokens) != len(ids):
            given = len(settings.max_new_tokens)
            raise InputError(
                f"max_new_tokens holds {given} numbers for {len(ids)} prompts; give one each, or one number"
            )
        one = callable(stopping_criteria) and not isinstance(stopping_criteria, list)
        rules = [stopping_criteria] if one else stopping_criteria
        chosen = (chooser or Chooser)(settings, logits_processor)
        drafts = self._drafting.choose(settings, chosen, len(ids))
        eos = self._eos(eos_token_id)
        decoder = Decoder(self.trunk, self.twig, plan, drafts.settings, eos, chosen, rules, drafts.grow, drafts.pace)
        seeds = self._seeds(settings.seed, len(ids))
        draws = self._draws(plan, seeds, ids, pixel_values)
        with torch.inference_mode():
            return self._run(decoder, ids, pixel_values, seeds, draws, streamers, drafts.name)

    def score(
        self,
        input_ids: torch.Tensor,
        targets: Sequence[Sequence[int]],
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        retained_tokens: float | None = None,
        pruning: str = "twig",
        seed: int | Sequence[int] | None = None,
        query: str = "last",
    ) -> list[Likelihood]:
        """How likely the (pruned) base finds given answers: token ids `targets`, one list a prompt, of any lengths.

        One pass reads prompt and answer. The other arguments are those of `generate`. Raises InputError
        for impossible arguments, or where prompt and answer do not fit into the context, and RunError
        where logits are not finite.
        """
        ids = self._rows(input_ids, attention_mask)
        plan = self._plan(pruning, retained_tokens, query)
        self._check_bare(plan, ids)
        if len(targets) != len(ids):
            raise InputError(f"{len(targets)} targets for {len(ids)} prompts; one each is needed")
        for b, (row, target) in enumerate(zip(ids, targets, strict=True)):
            if len(row) + len(target) > self.trunk.context:
                raise InputError(
                    f"the continuation has {len(target)} tokens (row {b}), and the context of {self.trunk.context} has room "
                    f"for {self.trunk.context - len(row)}; shorten it"
                )
        with torch.inference_mode():
            draws = self._draws(plan, self._seeds(seed, len(ids)), ids, pixel_values)
            prompts = embed(self.trunk, plan, ids, pixel_values, draws=draws)
            try:
                return score(self.trunk, self.twig, plan, prompts, targets)
            except NotFinite as fault:
                whole = [[*row, *target] for row, target in zip(ids, targets, strict=True)]
                raise trace(self.trunk, self.twig, whole, pixel_values, fault) from fault

    def check(self, **options) -> None:
        """Raise InputError for options of `generate` that this model cannot follow, whatever the prompt."""
        settings = GenerationSettings(**options)
        self._plan(settings.pruning, settings.retained_tokens, settings.query)

    def answer(self, image, question: str, history: Sequence = (), **settings) -> str:
        """The answer to a question about a picture (PIL image, path, URL, a list of them, or None).

        `history` are earlier turns about the same picture: (question, answer) pairs, or chat messages
        as Hugging Face has them. `settings` are those of `generate`. Raises InputError for an empty
        question or a picture that cannot be read.
        """
        inputs = self.prepare(image, question, history)
        out = self.generate(**inputs, **settings)
        return decode(self.tokenizer, out.tokens[0]).strip()

    def prepare(self, image, question: str, history: Sequence = ()) -> dict[str, torch.Tensor]:
        """`input_ids` [1, S] and `pixel_values` for `generate`: the template around a question.

        The pictures stand where the first question has `<image>` (or messages have image parts),
        else before it; in later turns `<image>` is a word.
        """
        if isinstance(question, str) and not question.strip():
            raise InputError("the question is empty; ask something")
        images = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
        inputs = {"input_ids": torch.tensor([self.prompts.ids(converse(history, question, len(images)))])}
        if images:
            inputs["pixel_values"] = self.pixels(images)
        return inputs

    def pixels(self, images: Sequence[str | Path | Image.Image]) -> torch.Tensor:
        """Pictures → [images, 3, h, w], padded to squares with the mean colour, or cut, as the model wants."""
        opened = [open_image(i) for i in images]
        return self.processor.image_processor(opened, return_tensors="pt")["pixel_values"]

    def text_tower(self, name: str) -> TextTower:
        """CLIP's text tower and what leads this model's vision tower to it, from a folder or hub id of the same CLIP."""
        return load_text_tower(name, self.device, self.dtype)

    # ------------------------------------------------------------------ the parts of generate

    def _run(self, decoder: Decoder, ids, pixel_values, seeds, draws, streamers, drafts: str) -> Output:
        rows: list[list[Step]] = [[] for _ in ids]
        start = self._now()
        prompts = embed(self.trunk, decoder.plan, ids, pixel_values, seeds, draws)
        first = None
        try:
            for row, streamer in enumerate(streamers):
                streamer.put(torch.tensor([ids[row]]))
            for round_ in decoder.steps(prompts):
                first = first or self._now()
                for row, step in round_:
                    rows[row].append(step)
                    if streamers:
                        feed(streamers[row], step)
                _tell_ends(decoder, streamers)
        except NotFinite as fault:
            histories = [[*ids[b], *(t for step in steps for t in step.tokens)] for b, steps in enumerate(rows)]
            raise trace(self.trunk, self.twig, histories, pixel_values, fault) from fault
        finally:  # also after an exception: who waits for the streamer's end would wait for ever
            end = self._now()
            for streamer in streamers:
                streamer.end()
        tokens = [[t for step in steps for t in step.tokens] for steps in rows]
        kept = decoder.state.kept
        kept = None if kept is None else [row[row >= 0] for row in kept.cpu()]
        seconds = first - start, end - first
        stats = measure(decoder, self.config, rows, kept, sum(map(len, ids)), seconds, drafts)
        scores = decoder.state.scores() if decoder.settings.traced else None
        return Output(tokens, kept, rows, stats, scores)

    def _rows(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
        """Each prompt as a list of token ids."""
        if not torch.is_tensor(input_ids):
            raise InputError(f"input_ids are a {type(input_ids).__name__}; a tensor [rows, tokens] is needed")
        if input_ids.dim() != 2 or not input_ids.numel():
            raise InputError(
                f"input_ids have shape {list(input_ids.shape)}; [rows, tokens] with one token at least is needed"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
        if mask.shape != input_ids.shape:
            raise InputError(f"attention_mask has shape {list(mask.shape)}, but input_ids have {list(input_ids.shape)}")
        ids = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
        vocabulary = self.trunk.vocabulary
        for b, row in enumerate(ids):
            if not row:
                raise InputError(f"row {b} of input_ids is empty under the attention mask; every prompt needs a token")
            if len(row) >= self.trunk.context:
                raise InputError(
                    f"prompt of {len(row)} tokens (row {b}) leaves no room in the context of {self.trunk.context}; shorten it"
                )
            if wrong := [t for t in row if not (0 <= t < vocabulary or t == self.image_token_id)]:
                raise InputError(
                    f"token id {wrong[0]} in row {b} is outside the vocabulary of {vocabulary}; wrong tokenizer?"
                )
        return ids

    def _check_bare(self, plan: Plan, ids: list[list[int]]) -> None:
        if plan and (bare := [b for b, row in enumerate(ids) if set(row) == {self.image_token_id}]):
            raise InputError(
                f"row {bare[0]} of input_ids holds image tokens only; pruned, it needs a text token to go on from"
            )

    def _streamers(self, given, rows: int) -> list:
        """One a row, or none at all."""
        streamers = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
        if streamers and len(streamers) != rows:
            raise InputError(
                f"a streamer takes one row, but input_ids have {rows} and {len(streamers)} streamers are given; give a list of "
                "one a row"
            )
        return streamers

    def _seeds(self, seed: int | Sequence[int] | None, rows: int) -> list[int]:
        """One seed a row; none if nobody asked for any."""
        if seed is None:
            return []
        if isinstance(seed, Sequence):
            if len(seed) != rows:
                raise InputError(f"seed holds {len(seed)} numbers for {rows} prompts; give one each, or one number")
            return list(seed)
        return [seed + b for b in range(rows)]

    def _draws(self, plan: Plan, seeds: list[int], ids, pixel_values: torch.Tensor | None) -> list[int]:
        """What random pruning draws from: a row's seed (or this call and the row) and its pictures' pixels."""
        if not plan.random:
            return []
        if not seeds:
            self._calls += 1
            seeds = [self._calls * CALL_STRIDE + b for b in range(len(ids))]
        ends = list(itertools.accumulate(row.count(self.image_token_id) // self.config.V for row in ids))
        pixels = [] if pixel_values is None else [p.contiguous().cpu().float().numpy() for p in pixel_values]
        marks = [zlib.crc32(b"".join(p.tobytes() for p in pixels[a:b])) for a, b in zip([0, *ends], ends, strict=False)]
        return [(seed % SEED_SPACE << 32) + mark for seed, mark in zip(seeds, marks, strict=True)]

    def _plan(self, pruning: str, retained: float | None, query: str) -> Plan:
        if retained is None:
            return plan_for(pruning, None, self.config.V, TwigConfig(L=10**6), query)  # checks the names
        config = self.twig.config if self.twig else self._fallback or TwigConfig(self.config.L, DEFAULT_K, DEFAULT_T)
        plan = plan_for(pruning, retained, self.config.V, config, query, self.base_name)
        calibrated.check(find_method(pruning, query), retained, self.trunk, self.base_name, self.twig)
        if self.twig is None and plan.needs_twig:
            lacks = "needs a twig, and none is loaded; give one, another method, or retained_tokens=None"
            raise InputError(f"pruning {pruning!r} {lacks}")
        if plan.tower is None:
            return plan
        if plan.tower.class_token and not self.trunk.family.tower().class_tokens:
            lacks = f"asks the vision tower's class token, and this one has none; {', '.join(classless())} do without"
            raise InputError(f"pruning {pruning!r} {lacks}")
        return replace(plan, tower=plan.tower.bind(self))

    def _eos(self, asked: int | Sequence[int] | None) -> list[int]:
        if asked is None:
            asked = self.model.generation_config.eos_token_id
        if asked is None:
            asked = self.model.config.text_config.eos_token_id
        return [] if asked is None else [asked] if isinstance(asked, int) else list(asked)

    def _now(self) -> float:
        return now(self.device)


def _tell_ends(decoder: Decoder, streamers: Sequence) -> None:
    """A streamer that has `put_end` hears that its row is written, while others may not be: what was kept, and visual tokens an image."""
    for row in decoder.rows:
        if row.done and streamers and hasattr(streamers[row.index], "put_end"):
            kept = None if decoder.state.kept is None else decoder.state.kept[row.index].cpu()
            kept = None if kept is None else kept[kept >= 0]
            streamers[row.index].put_end(kept, decoder.state.per_image()[row.index])


def load(
    base: str | Path | None = None,
    twig: str | Path | None = None,
    K: int | None = None,
    T: int | None = None,
    wipe_layer: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    twig_revision: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    draft_8bit: bool = False,
) -> TwigVLM:
    """Load a base and its twig: hub ids or folders; neither means the embedded model with its twig.

    `revision` is a commit, branch or tag of the base on the hub (of the twig, where only that is there),
    `twig_revision` of the twig; owner/name@REVISION says the same. Nothing that is downloaded is run.

    K, T and the wipe layer F come from the twig's files; the release format does not store K and F:
    then K=2 and F=round(0.75 L) unless given. `wipe_layer` overrides a stored F. A base without a
    twig is the plain baseline. `load_8bit` and `load_4bit` round the base's decoder layers while they
    are read, `draft_8bit` the twig's; they need torchao (docs/quantisation.md). Raises InputError for anything inconsistent, RunError when the hub
    cannot be reached.
    """
    for letter, value, least in (("K", K, 0), ("T", T, 1), ("wipe_layer", wipe_layer, 1)):
        if value is not None and value < least:
            raise InputError(f"{letter} is {value}; {least} or more is needed")
    base, twig = pinned(base, twig, revision, twig_revision)
    if base is None and twig is None:
        twig = EMBEDDED_TWIG
    rounding = ModelSettings(load_8bit=load_8bit, load_4bit=load_4bit, draft_8bit=draft_8bit)
    check_quantisation(rounding, twig is not None)
    where = pick_device(device)
    loaded = load_base(base, where, pick_dtype(dtype, where), attn_implementation, bits=rounding.bits)
    trunk = trunk_of(loaded.model)
    if twig is not None:
        grown = load_twig(twig, trunk, K, T, wipe_layer, loaded)
        if draft_8bit:
            quantise(grown.layers, 8)
        return TwigVLM(loaded, grown)
    if all(v is None for v in (K, T, wipe_layer)):
        return TwigVLM(loaded, None)
    return TwigVLM(loaded, None, TwigConfig(trunk.L, DEFAULT_K if K is None else K, T or DEFAULT_T, wipe_layer or 0))
