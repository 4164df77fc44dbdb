"""Which token: greedy or sampled, for a draft and for its verification.

Lossless in both: greedy accepts the longest prefix that the base would have written; sampling
accepts and corrects by rejection (Leviathan et al. 2023), so that the distribution is the base's
own. Temperature, top-k, top-p and every logits processor are Hugging Face's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..config import GenerationSettings
from .finite import NotFinite, finite

NO_TOKEN = -1  # read instead of a token where logits are not finite


@dataclass
class Proposal:
    """The draft of one row: tokens, the drafter's probability of each, its distributions when sampling."""

    tokens: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    distributions: list[torch.Tensor] = field(default_factory=list)


class Chooser:
    """Chooses for rows whose history (prompt and answer so far) is a list of token ids."""

    def __init__(self, settings: GenerationSettings, processors: Sequence | None = None):
        self.sampling = settings.do_sample
        self.processors = LogitsProcessorList(processors or [])
        if settings.do_sample:
            if settings.temperature != 1.0:
                self.processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k is not None:
                self.processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p is not None and settings.top_p < 1.0:
                self.processors.append(TopPLogitsWarper(settings.top_p))
        self.simple = not self.sampling and not self.processors

    def propose(
        self,
        logits: torch.Tensor,
        drafts: list[Proposal],
        histories: list[list[int]],
        generators: list,
        going: list[bool],
    ) -> None:
        """Append one token to the draft of every going row; `logits` [B, vocabulary] are the twig's."""
        if self.simple:
            best, tokens = logits.softmax(-1).max(-1)
            for draft, token, p, go in zip(drafts, tokens.tolist(), best.tolist(), going, strict=True):
                if go:
                    if math.isnan(p):
                        raise NotFinite("the twig's logits are not finite")
                    draft.tokens.append(token)
                    draft.probabilities.append(p)
            return
        for b, draft in enumerate(drafts):
            if going[b]:
                q = self._distribution(logits[b], histories[b] + draft.tokens)
                token = self._sample(q, generators[b]) if self.sampling else int(q.argmax())
                draft.tokens.append(token)
                draft.probabilities.append(float(q[token]))
                draft.distributions.append(q)

    def judge(
        self, logits: torch.Tensor, drafts: list[Proposal], histories: list[list[int]], generators: list
    ) -> list[tuple[int, int]]:
        """(accepted drafts, the base's next token) for each row; `logits` [B, n+1, vocabulary] are the base's."""
        if self.simple:
            choices = logits.argmax(-1).where(finite(logits), NO_TOKEN).tolist()
            if any(NO_TOKEN in c[: len(d.tokens) + 1] for d, c in zip(drafts, choices, strict=True)):
                raise NotFinite("the base's logits are not finite")
            return [_longest_prefix(d.tokens, c) for d, c in zip(drafts, choices, strict=True)]
        return [self._judge_row(logits[b], drafts[b], histories[b], generators[b]) for b in range(len(drafts))]

    def _judge_row(self, logits: torch.Tensor, draft: Proposal, history: list[int], generator) -> tuple[int, int]:
        for i, token in enumerate(draft.tokens):
            p = self._distribution(logits[i], history + draft.tokens[:i])
            if not self.sampling:
                if int(p.argmax()) != token:
                    return i, int(p.argmax())
                continue
            q = draft.distributions[i]
            q = torch.nn.functional.pad(q, (0, len(p) - len(q)))  # the base's vocabulary may be padded
            if torch.rand((), generator=generator) * q[token] > p[token]:
                return i, self._sample((p - q).clamp(min=0), generator)
        p = self._distribution(logits[len(draft.tokens)], history + draft.tokens)
        return len(draft.tokens), self._sample(p, generator) if self.sampling else int(p.argmax())

    def _distribution(self, logits: torch.Tensor, history: list[int]) -> torch.Tensor:
        """fp32 probabilities on the CPU after all processors. Image placeholders beyond the head are not history."""
        ids = torch.tensor([[t for t in history if t < len(logits)]], device=logits.device)
        probabilities = self.processors(ids, logits[None].clone())[0].float().softmax(-1)
        probabilities = probabilities.where(finite(logits), torch.nan).cpu()
        if probabilities[0].isnan():  # then all of them are
            raise NotFinite("the logits are not finite")
        return probabilities

    @staticmethod
    def _sample(weights: torch.Tensor, generator) -> int:
        return int(torch.multinomial(weights, 1, generator=generator))


def _longest_prefix(drafted: list[int], chosen: list[int]) -> tuple[int, int]:
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == chosen[accepted]:
        accepted += 1
    return accepted, chosen[accepted]
