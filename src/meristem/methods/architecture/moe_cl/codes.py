"""What is remembered of a task's inputs, in the shared expert's own coordinates.

z = A_0 x (r) is all that the shared expert sees of a layer's input x (d_in). While A_0 stays, statistics of z stay true,
as far as x does, whatever B_0 becomes: what the shared expert would say on an old task, and how far it has moved there,
follow from them. (What B_0 changes in the layers below shifts x: they are first-order, layer by layer.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIELDS = ("mean", "covariance", "moment")


@dataclass(frozen=True)
class CodeStatistics:
    """Of one task, in each of L layers.

    ``mean`` (L, r) and ``covariance`` (L, r, r): over rows, of the mean of z over a row's tokens.
    ``moment`` (L, r, r): E[z z^T] over tokens.
    """

    mean: Tensor
    covariance: Tensor
    moment: Tensor

    def tensors(self, task: int) -> dict[str, Tensor]:
        return {f"statistics.{task}.{field}": getattr(self, field) for field in FIELDS}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], task: int) -> CodeStatistics | None:
        """What ``tensors`` gave, or None."""
        found = [tensors.get(f"statistics.{task}.{field}") for field in FIELDS]
        return None if any(value is None for value in found) else cls(*found)


def row_means(codes: Tensor, mask: Tensor) -> Tensor:
    """(batch, r): the mean over a row's real tokens, of codes (batch, length, r) and mask (batch, length)."""
    weights = mask.to(codes)[..., None]
    return (codes * weights).sum(1) / weights.sum(1).clamp(min=1)


class Gatherer:
    """Sums over batches, layer by layer."""

    def __init__(self) -> None:
        self._means: dict[int, list[Tensor]] = {}
        self._moments: dict[int, Tensor] = {}
        self._tokens: dict[int, float] = {}

    def add(self, layer: int, codes: Tensor, mask: Tensor) -> None:
        """Of codes (batch, length, r) and mask (batch, length)."""
        exact, mask = codes.detach().cpu().double(), mask.cpu()  # not every device has float64
        self._means.setdefault(layer, []).append(row_means(exact, mask))
        real = exact[mask]
        self._moments[layer] = self._moments.get(layer, torch.zeros((), dtype=exact.dtype)) + real.T @ real
        self._tokens[layer] = self._tokens.get(layer, 0) + len(real)

    def statistics(self) -> CodeStatistics:
        layers = sorted(self._means)
        rows = [torch.cat(self._means[layer]) for layer in layers]
        centred = [found - found.mean(0) for found in rows]
        return CodeStatistics(
            torch.stack([found.mean(0) for found in rows]).float().cpu(),
            torch.stack([found.T @ found / max(len(found) - 1, 1) for found in centred]).float().cpu(),
            torch.stack([self._moments[layer] / self._tokens[layer] for layer in layers]).float().cpu(),
        )


class Anchor:
    """Where the shared expert stood, and how much its outputs on old tasks move from there.

    With Sigma_l = sum over old tasks i of g_s(i, l)^2 E_i[z z^T],

        drift = mean over layers of tr((B_0 - B_0*) Sigma_l (B_0 - B_0*)^T) / (tr(B_0* Sigma_l B_0*^T) + e)

    is the mean squared change of the layer's shared output over old inputs, as a share of its size; e, a hundredth
    of the layers' mean size, keeps layers that say next to nothing from being held the hardest.
    """

    def __init__(self, ups: Sequence[Tensor], seen: Sequence[CodeStatistics], shares: Tensor) -> None:
        """``ups``: B_0* (d_out, r) of each layer; ``shares`` (tasks, L): g_s."""
        self.ups = [up.detach().clone() for up in ups]
        weights = shares.to(seen[0].moment) ** 2
        self.sigma = torch.stack(
            [one.moment * w[:, None, None] for one, w in zip(seen, weights, strict=True)]
        ).sum(0)
        sizes = torch.stack([_energy(up, sigma) for up, sigma in zip(self.ups, self.sigma, strict=True)])
        self.sizes = sizes + sizes.mean() / 100 + torch.finfo(sizes.dtype).tiny

    def drift(self, ups: Sequence[Tensor]) -> Tensor:
        if self.sigma.device != ups[0].device:
            self.sigma, self.sizes = self.sigma.to(ups[0].device), self.sizes.to(ups[0].device)
            self.ups = [up.to(ups[0].device) for up in self.ups]
        moved = [
            _energy(up - start, sigma) for up, start, sigma in zip(ups, self.ups, self.sigma, strict=True)
        ]
        return (torch.stack(moved) / self.sizes).mean()


def _energy(up: Tensor, sigma: Tensor) -> Tensor:
    """tr(B Sigma B^T) of B (d_out, r)."""
    return ((up @ sigma.to(up)) * up).sum()
