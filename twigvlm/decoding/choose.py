"""Which token: greedy or sampled, for a draft and for its verification.

One way for both: a token is the arg max of the processed logits plus noise. Greedy, the noise is
zero; sampled, it is Gumbel noise, and the arg max is an exact draw from the base's own distribution.
The noise belongs to a row's seed and a place in its answer, whatever was drafted. So a seed gives the
same answer with any draft and with none, and the drafter, who knows the noise too, guesses well. (The
paper is greedy only; rejection sampling, Leviathan et al. 2023, has the same law and another text.)
Temperature, top-k, top-p and every logits processor are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..config import GenerationSettings
from ..model.finite import finite
from .draft import DraftTree

COLDEST = 1e-6  # a lower temperature is greedy: fp32 logits do not tell tokens apart that it would not
NO_TOKEN = -1  # read instead of a token where logits are not finite
NO_SCORES = -2  # and where the scores by which visual tokens were chosen are not


@dataclass
class Voice:
    """What choosing must know of one row: its history, and the noise of the places to come."""

    generator: torch.Generator
    history: list[int]  # prompt and answer so far
    coming: list[torch.Tensor] = field(default_factory=list)  # [vocabulary] each, for the next places

    def noise(self, place: int, vocabulary: int) -> torch.Tensor:
        """Gumbel noise for the token that is `place` places ahead."""
        while len(self.coming) <= place:
            drawn = torch.empty(vocabulary).exponential_(generator=self.generator)
            self.coming.append(-drawn.log())
        return self.coming[place]

    def write(self, token: int) -> None:
        self.history.append(token)
        if self.coming:
            self.coming.pop(0)


class Chooser:
    """Chooses tokens for rows, each with its Voice; `vocabulary` is the base's."""

    def __init__(self, settings: GenerationSettings, processors: Sequence | None = None):
        self.sampling = settings.do_sample and settings.temperature >= COLDEST
        self.processors = LogitsProcessorList(processors or [])
        self.warpers = LogitsProcessorList(_warpers(settings) if self.sampling else [])
        self.simple = not self.sampling and not self.processors

    def propose(
        self, logits: torch.Tensor, voices: Sequence[Voice], drafted: Sequence[torch.Tensor], vocabulary: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(token [B], its probability fp32 [B]) of the twig's `logits` [B, twig's vocabulary].

        `drafted` are the tokens [B] of the places before it that are not written yet.
        """
        if self.simple:
            score, token = logits.softmax(-1).max(-1)
            return token, score  # of logits that are not finite the score is NaN
        paths = [[d[b : b + 1] for d in drafted] for b in range(len(voices))]
        logits = self._process(logits[:, None], voices, [[path] for path in paths])[:, 0]
        noisy = logits
        if self.sampling:
            noise = [v.noise(len(drafted), vocabulary)[: logits.shape[-1]] for v in voices]
            noisy = logits + torch.stack(noise).to(logits.device)
        token = noisy.argmax(-1)
        return token, logits.softmax(-1).gather(1, token[:, None])[:, 0]

    def branch(
        self,
        logits: torch.Tensor,
        voices: Sequence[Voice],
        paths: torch.Tensor,
        children: int,
        vocabulary: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens [B, F, E], log of how far each is believed, fp32), best first: the E = `children` of F drafted nodes.

        `logits` [B, F, twig's vocabulary] are the twig's at the nodes, `paths` [B, F, n] the tokens that lead to them.
        A child is believed by its share among the logits with the noise of its place: what the base will compare.
        """
        if not self.simple:
            logits = self._process(logits, voices, [[[path] for path in row] for row in paths])
        if self.sampling:
            noise = [v.noise(paths.shape[2], vocabulary)[: logits.shape[-1]] for v in voices]
            logits = logits + torch.stack(noise).to(logits.device)[:, None]
        believed, tokens = logits.log_softmax(-1).topk(children)
        return tokens, believed

    def judge(self, logits: torch.Tensor, tree: DraftTree, voices: Sequence[Voice]) -> torch.Tensor:
        """[B, N+1]: what the base writes after the newest token and after each node; its `logits` [B, N+1, vocabulary].

        NO_TOKEN where they are not finite.
        """
        if self.simple:
            return logits.argmax(-1).where(finite(logits), NO_TOKEN)
        good = finite(logits)
        logits = self._process(logits, voices, _paths(tree) if self.processors else None)
        good = good & logits.logsumexp(-1).isfinite()  # a processor may have left nothing to say
        if self.sampling:
            noise = [torch.stack([v.noise(d, logits.shape[-1]) for d in range(tree.levels + 1)]) for v in voices]
            drawn = torch.stack(noise).to(logits.device)  # B levels+1 vocabulary
            if not tree.chain:  # nodes of one depth share it: one of them is visited at most
                depth = torch.nn.functional.pad(tree.depth(), (1, 0))
                drawn = drawn.gather(1, depth[..., None].expand(-1, -1, logits.shape[-1]))
            logits = logits + drawn
        return logits.argmax(-1).where(good, NO_TOKEN)

    def _process(
        self, logits: torch.Tensor, voices: Sequence[Voice], paths: list[list[list[torch.Tensor]]] | None
    ) -> torch.Tensor:
        """fp32 logits [B, n, vocabulary] after all processors; paths[b][i] are the tokens behind b's history at i."""
        if self.processors:
            out = torch.empty_like(logits)
            for b, voice in enumerate(voices):
                # Image placeholders beyond the head are not history.
                told = torch.tensor([t for t in voice.history if t < logits.shape[-1]], device=logits.device)
                for i in range(logits.shape[1]):
                    ids = torch.cat([told, *paths[b][i]])[None]
                    out[b, i] = self.processors(ids, logits[b, i : i + 1].clone())[0]
            logits = out
        if self.warpers:
            logits = self.warpers(None, logits.flatten(0, 1)).unflatten(0, logits.shape[:2])
        return logits.float()


def _warpers(settings: GenerationSettings) -> list:
    found = []
    if settings.temperature != 1.0:
        found.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k is not None:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None and settings.top_p < 1.0:
        found.append(TopPLogitsWarper(settings.top_p))
    return found


def _paths(tree: DraftTree) -> list[list[list[torch.Tensor]]]:
    """Tokens from the root's first child down to each node, root (none) first."""
    out = []
    for b, row in enumerate(tree.parents()):
        paths: list[list[torch.Tensor]] = [[]]
        for i, parent in enumerate(row):
            paths.append([*paths[parent + 1], tree.token[b, i : i + 1]])
        out.append(paths)
    return out
