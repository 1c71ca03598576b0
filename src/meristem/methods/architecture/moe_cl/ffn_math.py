"""One gated MLP computed as a mixture of a shared and a task's expert.

With x (d) a token's input, W1 (f, d), W3 (f, d), W2 (d, f) the MLP's gate, up and down projections, act its
activation and e = 0 the shared expert or e = t the task's, each a LoRA A, B per projection with s = alpha / r,

    h_e = act(W1 x + s B1_e A1_e x) * (W3 x + s B3_e A3_e x)                        (f)
    E_e = W2 h_e + s B2_e A2_e h_e                                                  (d)
    y   = g_0 E_0 + g_t E_t            [g_0, g_t] = softmax(W_g x), W_g (2, d)

W1 x and W3 x serve both experts, and W2 is linear: W2 (g_0 h_0 + g_t h_t) is its only product (its bias counts once,
since the gates sum to 1). The A of all experts stand one below the other, so that A x is one product.

Source: arXiv 2509.18133 (MoE-CL), written from the equations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


@dataclass(frozen=True)
class Projection:
    """A linear layer under all LoRAs of a forward: ``down`` (R, d_in), ``up`` (d_out, R)."""

    base: nn.Module
    down: Tensor
    up: Tensor
    dropout: nn.Module | None = None

    def codes(self, x: Tensor, part: slice = slice(None)) -> Tensor:
        """A x (batch, length, R) of the rows ``part``."""
        x = _at(x, self.down)
        return linear(x if self.dropout is None else self.dropout(x), self.down[part])

    def plus(self, product: Tensor, codes: Tensor, part: slice = slice(None)) -> Tensor:
        """``product`` + B codes (batch, length, d_out), in the dtype of ``product``, to which PEFT rounds too."""
        flat, codes = _at(product, self.up).flatten(0, -2), _at(codes, self.up).flatten(0, -2)
        whole = torch.addmm(flat, codes, self.up[:, part].T)
        return whole.view_as(product).to(product.dtype)


@dataclass(frozen=True)
class Stack:
    """The LoRAs that a forward uses: ``shared`` rows of the shared expert's, then those of the task experts.

    ``scale``: alpha / r, or (batch, 1, R) with 0 where a row does not have the expert. ``known`` (batch, 1, 1): 1 where
    a row has a task expert, 0 where the shared one stands alone; None where all have one.
    """

    projections: tuple[Projection, Projection, Projection]  # W1, W3, W2
    shared: int
    scale: float | Tensor
    known: Tensor | None = None

    @property
    def shared_alone(self) -> bool:
        return len(self.projections[0].down) == self.shared

    def scaled(self, codes: Tensor, part: slice = slice(None)) -> Tensor:
        """s A x of the rows ``part``, 0 for the experts that a row of the batch does not have."""
        return codes * (self.scale[..., part].to(codes) if isinstance(self.scale, Tensor) else self.scale)


@dataclass(frozen=True)
class SharedHalf:
    """What E_0 is linear in: h_0 (batch, length, f) and s A2_0 h_0 (batch, length, r)."""

    hidden: Tensor
    codes: Tensor


def mixture(
    act: Callable[[Tensor], Tensor], stack: Stack, gate: Tensor, x: Tensor
) -> tuple[Tensor, SharedHalf]:
    """y (batch, length, d) as above for x (batch, length, d) and W_g ``gate``, and the shared expert's part of it."""
    first, third, second = stack.projections
    w1, w3 = first.base(x), third.base(x)
    a1, a3 = stack.scaled(first.codes(x)), stack.scaled(third.codes(x))

    def half(part: slice) -> tuple[Tensor, Tensor]:
        hidden = act(first.plus(w1, a1[..., part], part)) * third.plus(w3, a3[..., part], part)
        return hidden, stack.scaled(second.codes(hidden, part), part)

    h_0, z_0 = half(slice(stack.shared))
    shared = SharedHalf(h_0, z_0)
    if stack.shared_alone:
        return second.plus(second.base(h_0), z_0), shared
    h_t, z_t = half(slice(stack.shared, None))
    share = task_share(gate, x)
    if stack.known is not None:
        share = share * stack.known.to(share)
    codes = torch.cat([z_0 * (1 - share).to(z_0.dtype), z_t * share.to(z_t.dtype)], -1)
    return second.plus(second.base(torch.lerp(h_0, h_t, share.to(h_0.dtype))), codes), shared


def task_share(gate: Tensor, x: Tensor) -> Tensor:
    """g_t (batch, length, 1) in fp32 or finer; g_0 is 1 - g_t."""
    scores = linear(_at(x, gate), gate)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., 1:]


def shared_mean(half: SharedHalf, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The means (batch, f), (batch, r) of ``half`` over the tokens that ``mask`` (batch, length) keeps.

    E_0 is linear in them: its mean is W2 times the first plus B2_0 times the second.
    """
    count = mask.sum(1, keepdim=True).clamp(min=1)
    hidden, codes = (
        torch.bmm(mask[:, None].to(part), part)[:, 0] / count for part in (half.hidden, half.codes)
    )
    return hidden, codes


def shared_output(stack: Stack, hidden: Tensor, codes: Tensor) -> Tensor:
    """The mean of E_0 (batch, d) from what :func:`shared_mean` gives.

    It is called after the forward, outside the autocast that may have been on there.
    """
    second = stack.projections[2]
    weight = second.base.weight
    if isinstance(weight, Tensor) and weight.is_floating_point():
        hidden = _at(hidden, weight)
    return second.plus(second.base(hidden), codes, slice(stack.shared))


def _at(x: Tensor, weights: Tensor) -> Tensor:
    """``x`` in the dtype in which it meets ``weights``; autocast sees to that itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weights.dtype)
