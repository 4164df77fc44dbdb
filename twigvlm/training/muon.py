"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024), for the hidden matrices of a decoder.

Small models find look-ups in fewer steps with it than with AdamW. Everything that is no hidden
matrix (embeddings, head, norms, biases) is trained by AdamW in the same optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Jordan's quintic: five rounds bring every singular value near one.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """[n, rows, columns] → about U V^T of each one's singular value decomposition."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        square = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """`matrices` by Muon at learning rate `lr`, `others` by Adam at `lr` times `ratio`."""

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        others: Iterable[torch.nn.Parameter],
        lr: float,
        ratio: float = 0.15,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
    ):
        groups = [
            {"params": list(matrices), "hidden": True, "ratio": 1.0},
            {"params": list(others), "hidden": False, "ratio": ratio},
        ]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._orthogonal if group["hidden"] else self._adam)(group, params)

    def _orthogonal(self, group: dict, params: list[torch.nn.Parameter]) -> None:
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        for shape, alike in by_shape.items():  # a decoder has hundreds of matrices of few shapes: few calls
            size = max(1.0, shape[0] / shape[1]) ** 0.5
            grads, momenta = [p.grad for p in alike], [self.state[p]["momentum"] for p in alike]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
            changes = list(orthogonal(torch.stack(ahead)).unbind())
            torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(alike, changes, alpha=-group["lr"] * size)

    def _adam(self, group: dict, params: list[torch.nn.Parameter]) -> None:
        lr, (b1, b2) = group["lr"] * group["ratio"], group["betas"]
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - b1)
            state["square"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            spread = (state["square"] / (1 - b2 ** state["step"])).sqrt_().add_(1e-8)
            p.addcdiv_(state["mean"], spread, value=-lr / (1 - b1 ** state["step"]))


def for_decoder(module: torch.nn.Module, config) -> Muon:
    """The optimizer of a model whose decoder's layers are learning: their matrices by Muon, the rest by Adam."""
    learning = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    hidden = [p for n, p in learning if p.ndim == 2 and "language_model.layers." in n]
    names = {id(p) for p in hidden}
    return Muon(
        hidden, [p for _, p in learning if id(p) not in names], config.lr, betas=config.betas,
        weight_decay=config.weight_decay,
    )  # fmt: skip
