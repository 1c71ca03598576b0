"""How a layer divides its weight between the shared expert and a task's own: ``[g_s, g_t]``, which sum to 1.

static    softmax(theta)       theta (2), one per task and layer
token     softmax(V x)         V (2, d_in), one per task and layer, x (d_in) each token's input
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Kind = Literal["static", "token", "shared-only", "task-only"]
_CLOSED = 1e4  # a difference of logits whose softmax is 1 and 0 to the bit


def shares(gates: Tensor, x: Tensor) -> Tensor:
    """[g_s, g_t] of n tasks: (n, 2) for static ``gates`` (n, 2); for those by token, (n, 2, d_in), (..., n, 2)."""
    if gates.dim() == 2:
        return gates.softmax(-1)
    logits = linear(x.to(gates.dtype), gates.flatten(0, 1))
    return logits.unflatten(-1, (len(gates), 2)).softmax(-1)


def divide(
    gates: Tensor, used: list[int], given: Tensor, unknown: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights of the shared expert (batch) and of the n experts ``used`` (batch, n), or both by token.

    From the gates of all experts of a layer, the weights ``given`` (batch, n) by the router and ``unknown``
    (batch), what it gave to none: that is the shared expert's as tasks give it on average, or one half by token.
    """
    divided = shares(gates[used], x)
    if gates.dim() == 2:
        usual = shares(gates, x)[:, 0].mean()
    else:
        given, unknown, usual = given[:, None], unknown[:, None], torch.full((), 0.5).to(divided)
    return (given * divided[..., 0]).sum(-1) + unknown * usual, given * divided[..., 1]


class Gates(nn.Module):
    """The gates in training, of layers with ``widths`` (name -> d_in). They start at one half each.

    ``rate``: static logits are rate * the parameter, so that an optimizer whose steps have the size of its learning
    rate (AdamW) moves them ``rate`` times as far. ``shared-only`` and ``task-only`` are fixed, for ablations.
    """

    def __init__(self, kind: Kind, widths: Mapping[str, int], rate: float, exact: torch.dtype) -> None:
        super().__init__()
        self.kind, self.rate, self.at = kind, rate, {name: at for at, name in enumerate(widths)}
        if kind == "token":
            self.weights = nn.ParameterList(torch.zeros(2, width, dtype=exact) for width in widths.values())
        elif kind == "static":
            self.logits = nn.Parameter(torch.zeros(len(widths), 2, dtype=exact))
        else:
            fixed = [_CLOSED, 0.0] if kind == "shared-only" else [0.0, _CLOSED]
            self.register_buffer("fixed", torch.tensor(fixed, dtype=exact), persistent=False)

    def of(self, layer: str) -> Tensor:
        """(2) or (2, d_in)."""
        found: Tensor
        if self.kind == "token":
            found = self.weights[self.at[layer]]
        elif self.kind == "static":
            found = self.rate * self.logits[self.at[layer]]
        else:
            found = self.fixed
        return found

    @torch.no_grad()
    def kept(self) -> dict[str, Tensor]:
        return {layer: self.of(layer).detach().cpu().clone() for layer in self.at}

    @torch.no_grad()
    def restore(self, found: Mapping[str, Tensor]) -> None:
        for layer, at in self.at.items():
            if self.kind == "token":
                self.weights[at].copy_(found[layer])
            elif self.kind == "static":
                self.logits[at].copy_(found[layer].to(self.logits) / self.rate)
