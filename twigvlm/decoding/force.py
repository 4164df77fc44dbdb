"""Teacher forcing in the one decode loop: given tokens instead of chosen ones, and how likely the base finds them.

It stands where the Chooser stands, so that a likelihood is measured under the same pruning, caches
and masks as an answer is written. With a twig one verification reads all tokens, without one the
base reads them one by one; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .choose import Proposal
from .finite import NotFinite, finite


class Forced:
    """Writes `targets`, B rows of token ids of one length n; give it to `TwigVLM.generate` as `chooser`.

    Generate with `max_new_tokens=n`, `eos_token_id=[]` (an end token is a token like any other) and
    `draft_length=n - 1`; prompt and targets must fit into the context. Afterwards `log_probabilities`
    (natural, fp32) and `greedy` (was it the base's first choice) are [B, n].
    """

    simple = True  # needs no history

    def __init__(self, targets: Sequence[Sequence[int]]):
        if not targets or not targets[0] or len({len(row) for row in targets}) > 1:
            raise ValueError("targets are rows of one length, of one token at least")
        self._targets = torch.tensor([list(row) for row in targets])
        self._log_probabilities: list[torch.Tensor] = []
        self._greedy: list[torch.Tensor] = []
        self._done = 0

    @property
    def log_probabilities(self) -> torch.Tensor:
        return torch.cat(self._log_probabilities, 1)

    @property
    def greedy(self) -> torch.Tensor:
        return torch.cat(self._greedy, 1)

    def propose(self, logits, drafts: list[Proposal], histories, generators, going: list[bool]) -> None:
        """The next target of each row, with full confidence: drafting goes on."""
        for row, draft, go in zip(self._targets, drafts, going, strict=True):
            if go:
                draft.tokens.append(int(row[self._done + len(draft.tokens)]))
                draft.probabilities.append(1.0)

    def judge(self, logits: torch.Tensor, drafts: list[Proposal], histories, generators) -> list[tuple[int, int]]:
        """Accept every draft and write one more target; `logits` [B, n, vocabulary] are the base's."""
        count = len(drafts[0].tokens) + 1
        wanted = self._targets[:, self._done : self._done + count]
        here = wanted.to(logits.device)
        found = logits.log_softmax(-1).gather(-1, here[..., None])[..., 0].where(finite(logits), torch.nan).cpu()
        if found.isnan().any():
            raise NotFinite("the base's logits are not finite")
        self._log_probabilities.append(found)
        self._greedy.append((logits.argmax(-1) == here).cpu())
        self._done += count
        return [(count - 1, int(row[-1])) for row in wanted]
